"""What learns, in every family; that it starts as the base and has the gradients of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.adapters.full.method import PartialAdapter
from dist_peft.adapters.protocol import TrainsBaseWeights
from dist_peft.core.config.run import BaseConfig, FullConfig, PartialConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.trainable_steps import ALWAYS
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.reader import RowReader
from tests.support.tiny_models import CONFIGS, TRANSPOSED, save_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def skeleton_of(directory: Path, **changes: Any) -> Skeleton:
    fields = {"path": str(directory), "quant": None, "compute_dtype": "float32"} | changes
    return build_skeleton(BaseConfig(**fields), directory)


def load(
    directory: Path, config: FullConfig | PartialConfig | None, **changes: Any
) -> tuple[nn.Module, PartialAdapter]:
    """The model, filled; without ``config`` as it is."""
    skeleton = skeleton_of(directory, **changes)
    dtype = getattr(torch, changes.get("compute_dtype", "float32"))
    adapter = PartialAdapter(config or FullConfig(), arithmetic=dtype)
    if config is not None:
        adapter.attach_to_model(skeleton.model)
    engine = SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton.model, adapter


def loss_of(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


@pytest.mark.parametrize("family", [*CONFIGS, "gpt2"])
def test_full_has_the_gradients_of_the_model_itself(family: str, tmp_path: Path) -> None:
    original = save_model((CONFIGS | TRANSPOSED)[family], tmp_path)
    model, adapter = load(tmp_path, FullConfig())
    assert isinstance(adapter, TrainsBaseWeights)
    mine, its = trainable_parameters(model), dict(original.named_parameters())
    assert mine.keys() == its.keys() == adapter.list_source_tensors().keys()
    assert set(adapter.list_source_tensors().values()) <= build_names(tmp_path)
    for name, parameter in mine.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, its[name]), name
        assert adapter.get_trainable_steps(name) == ALWAYS
    loss, expected = loss_of(model), loss_of(original)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, its[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def build_names(directory: Path) -> set[str]:
    return set(skeleton_of(directory).index.tensors)


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gemma2", "opt"])
def test_bfloat16_starts_as_exactly_the_base(family: str, tmp_path: Path) -> None:
    """Masters are float32, copies are the base's rows; all have gradients."""
    save_model(CONFIGS[family], tmp_path, dtype=torch.bfloat16)
    frozen, _ = load(tmp_path, None, compute_dtype="bfloat16")
    model, _ = load(tmp_path, FullConfig(), compute_dtype="bfloat16")
    assert torch.equal(loss_of(model), loss_of(frozen))
    loss_of(model).backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.any(), name


LAYER = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
LAYER += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
CHOICES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "norms": (
        "llama",
        {"parts": ["norms"]},
        {"model.norm.weight", *(f"model.layers.{i}.{n}" for i in (0, 1) for n in NORMS)},
    ),
    "last block": (
        "llama",
        {"last_blocks": 1},
        {f"model.layers.1.{name}" for name in [*LAYER, *NORMS]},
    ),
    "ends": (
        "llama",
        {"parts": ["embeddings", "head"]},
        {"model.embed_tokens.weight", "lm_head.weight"},
    ),
    "tied head": ("llama-tied-bias", {"parts": ["head"]}, {"model.embed_tokens.weight"}),
    "BitFit": (
        "llama-tied-bias",
        {"parts": ["biases"]},
        {f"model.layers.{i}.{name.removesuffix('weight')}bias" for i in (0, 1) for name in LAYER},
    ),
    "positions": (
        "opt",
        {"parts": ["embeddings"]},
        {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_is_chosen_learns_and_the_rest_is_quantized(case: str, tmp_path: Path) -> None:
    family, fields, expected = CHOICES[case]
    save_model(CONFIGS[family], tmp_path)
    model, adapter = load(tmp_path, PartialConfig(**fields), quant=QuantConfig())
    learning = trainable_parameters(model)
    assert learning.keys() == expected == adapter.list_source_tensors().keys()
    loss_of(model).backward()
    assert all(p.grad is not None and p.grad.any() for p in learning.values())
    linears = {n for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    trained = {name.removesuffix(".weight") for name in expected}
    assert linears and not linears & trained
    assert all(p.grad is None for n, p in model.named_parameters() if n not in learning)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    save_model(CONFIGS["llama-tied-bias"], tmp_path)
    model: Any = load(tmp_path, PartialConfig(parts=["embeddings"]))[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_earliest_stage_counts(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    stages: Any = [
        {"step": 9, "parts": ["all"]},
        {"step": 5, "last_blocks": 1},
    ]
    model, adapter = load(tmp_path, PartialConfig(parts=["norms"], unfreeze=stages))
    steps = adapter.get_trainable_steps
    assert steps("model.layers.1.input_layernorm.weight") == ALWAYS
    assert steps("model.layers.1.mlp.up_proj.weight").ranges == ((5, None),)
    assert steps("model.layers.0.mlp.up_proj.weight").ranges == ((9, None),)
    seen = {}
    for step in (0, 5, 9):
        model.zero_grad()
        adapter.begin_micro_batch(step, torch.zeros(2))
        loss_of(model).backward()
        seen[step] = {n for n, p in trainable_parameters(model).items() if p.grad is not None}
        assert seen[step] == {n for n in trainable_parameters(model) if steps(n).includes(step)}
    assert len(seen[0]) < len(seen[5]) < len(seen[9]) == len(trainable_parameters(model))


def test_one_block_after_the_other_and_sampled_blocks(tmp_path: Path) -> None:
    """Greedy layer-wise training from the first block on, and LISA."""
    save_model(CONFIGS["llama"], tmp_path)
    turns: Any = [{"step": 0, "until": 3, "blocks": [0]}, {"step": 3, "until": 6, "blocks": [1]}]
    sample: Any = {"count": 1, "every": 4}
    for config in (
        PartialConfig(unfreeze=turns),
        PartialConfig(parts=["embeddings", "head"], sample_blocks=sample),
    ):
        model, adapter = load(tmp_path, config)
        trained = []
        for step in range(8):
            model.zero_grad()
            adapter.begin_micro_batch(step, torch.zeros(2))
            loss = loss_of(model)
            if loss.requires_grad:
                loss.backward()
            with_gradient = {
                n.rpartition(".mlp.")[0]
                for n, p in trainable_parameters(model).items()
                if p.grad is not None
            }
            trained.append([i for i in (0, 1) if f"model.layers.{i}" in with_gradient])
        if config.sample_blocks is None:
            assert trained == [[0]] * 3 + [[1]] * 3 + [[]] * 2
        else:
            assert trained[0] == trained[3] and trained[4] == trained[7]
            assert all(len(blocks) == 1 for blocks in trained)


def test_refused(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    for fields, message in (
        (
            {"parts": ["biases"]},
            r"no biases; it has all, norms, embeddings, head",
        ),
        ({"last_blocks": 3}, r"last_blocks: 3, but the model has 2 decoder blocks"),
        ({"blocks": [0, 2]}, r"adapter.blocks: 2, but the model has 2 decoder blocks"),
        ({"sample_blocks": {"count": 3}}, r"sample_blocks.count is 3, but the model has 2"),
    ):
        with pytest.raises(UserError, match=message):
            PartialAdapter(PartialConfig(**fields), arithmetic=torch.float32).attach_to_model(
                skeleton_of(tmp_path).model
            )
    skeleton = skeleton_of(tmp_path)
    linear = next(m for m in skeleton.model.modules() if isinstance(m, FrozenLinear))
    linear.stored = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"q_proj would learn, but it comes quantized from base"):
        PartialAdapter(FullConfig(), arithmetic=torch.float32).attach_to_model(skeleton.model)


@pytest.mark.parametrize("part", ["embeddings", "head", "all"])
def test_packed_ends_are_not_trained(part: str, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    quant = QuantConfig(embeddings=True)
    adapter = PartialAdapter(PartialConfig(parts=[part]), arithmetic=torch.float32)  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"would learn, but base\.quant\.embeddings packs"):
        adapter.attach_to_model(skeleton_of(tmp_path, quant=quant).model)
    model, _ = load(tmp_path, PartialConfig(parts=["norms"], last_blocks=1), quant=quant)
    loss_of(model).backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())
