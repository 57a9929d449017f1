"""Combined adapters against dense arithmetic, and in real PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.lora.combination import CombineRecipe, combine_adapters
from dist_peft.adapters.lora.tensors import parse_lora_tensors
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from tests.support.tiny_models import CONFIGS, save_model

OUT, IN = 12, 20
PATHS = ("model.layers.0.a_proj", "model.layers.0.b_proj")


def lora(seed: int, r: int = 3, paths: tuple[str, ...] = PATHS, **config: Any) -> PublicAdapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        for name, shape in (("A", (r, IN)), ("B", (OUT, r))):
            value = torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{path}.lora_{name}.weight"] = value
    base = {"peft_type": "LORA", "r": r, "lora_alpha": 6.0, "target_modules": list(PATHS)}
    return PublicAdapter({**base, **config}, tensors)


def change(public: PublicAdapter, path: str) -> Tensor:
    own = parse_lora_tensors(public)[path]
    return own.scaling * (own.B.double() @ own.A.double())


def test_linear_is_exact_whatever_the_ranks() -> None:
    a, b = lora(1), lora(2, r=5, use_rslora=True)
    combined, kept = combine_adapters({"a": a, "b": b}, [0.7, -0.4], CombineRecipe())
    assert kept == 1.0 and combined.config["r"] == 8
    for path in PATHS:
        expected = 0.7 * change(a, path) - 0.4 * change(b, path)
        torch.testing.assert_close(change(combined, path), expected, rtol=1e-5, atol=1e-5)


def test_a_change_that_depends_on_the_base_is_refused() -> None:
    masked = lora(2, peft_type="MASKED_LORA")
    with pytest.raises(UserError, match=r"b was trained with adapter\.keep_zeros"):
        combine_adapters({"a": lora(1), "b": masked}, [0.7, -0.4], CombineRecipe())


def test_modules_of_one_adapter_alone_keep_their_rank() -> None:
    a, b = lora(1), lora(2, paths=PATHS[:1])
    combined, _ = combine_adapters({"a": a, "b": b}, [1.0, 1.0], CombineRecipe())
    assert combined.config["rank_pattern"] == {PATHS[1]: 3}
    torch.testing.assert_close(change(combined, PATHS[1]), change(a, PATHS[1]))


def test_a_lower_rank_is_the_best_one() -> None:
    a, b = lora(1), lora(2)
    combined, kept = combine_adapters({"a": a, "b": b}, [1.0, 1.0], CombineRecipe(rank=2))
    lost = total = 0.0
    for path in PATHS:
        dense = change(a, path) + change(b, path)
        values = torch.linalg.svdvals(dense)
        error = (change(combined, path) - dense).square().sum()
        torch.testing.assert_close(error, values[2:].square().sum(), rtol=1e-3, atol=0)
        lost, total = lost + float(error), total + float(dense.square().sum())
    assert kept == pytest.approx(1 - lost / total, rel=1e-4)


def slow_ties(changes: list[np.ndarray], density: float) -> np.ndarray:
    """Entry by entry."""
    result = np.zeros_like(changes[0])
    limits = []
    for one in changes:
        sizes = np.sort(np.abs(one).ravel())[::-1]
        limits.append(sizes[max(1, round(density * one.size)) - 1])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            entries = [
                c[i, j] if abs(c[i, j]) >= m else 0.0 for c, m in zip(changes, limits, strict=True)
            ]
            sign = np.sign(sum(entries))
            same = [e for e in entries if e and np.sign(e) == sign]
            result[i, j] = sum(same) / len(same) if same else 0.0
    return result


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_ties_is_the_papers(density: float) -> None:
    a, b, c = lora(1), lora(2), lora(3)
    weights = [1.0, 0.5, -2.0]
    recipe = CombineRecipe("ties", density, rank=OUT)
    combined, kept = combine_adapters({"a": a, "b": b, "c": c}, weights, recipe)
    assert kept == pytest.approx(1.0, abs=1e-6)
    for path in PATHS:
        dense = [w * change(p, path).numpy() for w, p in zip(weights, (a, b, c), strict=True)]
        expected = torch.from_numpy(slow_ties(dense, density))
        torch.testing.assert_close(change(combined, path), expected, rtol=1e-4, atol=1e-4)


def test_dare_keeps_a_share_and_the_mean() -> None:
    """Over many seeds the mean is the linear sum; with one seed, entries are 0 or scaled."""
    a = lora(1, paths=PATHS[:1])
    linear = change(a, PATHS[0])
    total = torch.zeros_like(linear)
    for seed in range(200):
        one, _ = combine_adapters({"a": a}, [1.0], CombineRecipe("dare", 0.5, rank=OUT, seed=seed))
        dense = change(one, PATHS[0])
        dropped = dense.abs() < 1e-3 * linear.abs()
        torch.testing.assert_close(dense[~dropped], 2 * linear[~dropped], rtol=1e-2, atol=1e-3)
        total += dense / 200
    error = (total - linear).norm() / linear.norm()
    assert error < 0.15  # 1 / sqrt(200) is expected


def test_dare_depends_on_the_seed_alone() -> None:
    made = [
        combine_adapters({"a": lora(1)}, [1.0], CombineRecipe("dare", seed=s))[0].tensors
        for s in (1, 1, 2)
    ]
    same = [all(torch.equal(made[0][k], other[k]) for k in made[0]) for other in made[1:]]
    assert same == [True, False]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lora(2, use_dora=True), "is absent|DoRA"),
        (PublicAdapter({**lora(2).config, "peft_type": "PROMPT_TUNING"}, {}), "b is PROMPT_TUNING"),
        (PublicAdapter({"peft_type": "IA3"}, {}), "b is IA3 .*only LoRA adapters are combined"),
    ],
)
def test_what_is_no_plain_lora(other: PublicAdapter, words: str) -> None:
    if other.config.get("use_dora"):
        for path in PATHS:
            key = f"base_model.model.{path}.lora_magnitude_vector"
            other.tensors[key] = torch.ones(OUT)
    with pytest.raises(UserError, match=words):
        combine_adapters({"a": lora(1), "b": other}, [1.0, 1.0], CombineRecipe())


def test_other_shapes_are_another_base() -> None:
    other = lora(2)
    key = f"base_model.model.{PATHS[0]}.lora_A.weight"
    other.tensors[key] = torch.randn(3, IN + 1)
    with pytest.raises(UserError, match=r"different bases: model\.layers\.0\.a_proj is \[12, 20\]"):
        combine_adapters({"a": lora(1), "b": other}, [1.0, 1.0], CombineRecipe())


def test_peft_computes_the_sum(tmp_path: Path) -> None:
    """Real PEFT, with the result, gives base + 0.7 a + 0.3 b."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    save_model(CONFIGS["llama"], tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    made: list[PublicAdapter] = []
    linears = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, module in linears.items():
            key = f"base_model.model.{name}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            shape = module.out_features, 2
            tensors[f"{key}_B.weight"] = torch.randn(shape, generator=generator) * 0.05
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["q_proj", "down_proj"],
            "base_model_name_or_path": str(tmp_path / "base"),
        }
        made.append(PublicAdapter(config, tensors))
    combined, _ = combine_adapters(dict(zip("ab", made, strict=True)), [0.7, 0.3], CombineRecipe())
    write_adapter_directory(tmp_path / "adapter", combined, {})
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        found = loaded(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        for name in linears:
            weight = plain.get_submodule(name).weight
            for share, public in zip((0.7, 0.3), made, strict=True):
                weight += share * change(public, name).float()
        expected = plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
