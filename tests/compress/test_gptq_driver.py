"""GPTQ on a whole model: what each stage sees, how the sums are scaled, which text is taken."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.quantized_base import load_calibration_sequences
from dist_peft.app.resolved_config import resolve_quantization
from dist_peft.compress import block_loop
from dist_peft.compress.gptq_driver import solve_gptq_codes
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.gptq import compute_gram, factorize_hessian, solve_weight_rows
from tests.support.quantized_runs import GPTQ
from tests.support.tiny_runs import save_records, tiny_tree

CPU = torch.device("cpu")


def built_of(directory: Path, *, seed: int = 0, **quant: Any) -> LoadedModel:
    tree = tiny_tree(directory, base__quant={**GPTQ, **quant}, train__seed=seed)
    save_records(directory / "train.jsonl", 30, 10)
    config = parse_config(tree)
    return load_weights(build_model(resolve_quantization(config)), World(), CPU)


def linear_of(built: LoadedModel, name: str) -> FrozenLinear:
    (found,) = (m for n, m in built.model.named_modules() if n.endswith(name))
    assert isinstance(found, FrozenLinear)
    return found


@torch.no_grad()
def inputs_of(built: LoadedModel, linear: FrozenLinear, windows: Tensor) -> Tensor:
    """What it reads in the model as it is now, all windows together."""
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for ids in windows:
        built.model(input_ids=ids.unsqueeze(0), use_cache=False)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"])
def test_each_linear_is_solved_on_what_the_solved_ones_before_it_give(
    name: str, tmp_path: Path
) -> None:
    built = built_of(tmp_path)
    windows = load_calibration_sequences(built.setup, World())
    assert windows.shape == (3, 24)
    solve_gptq_codes(built.setup.skeleton, built.engine, windows, World())
    linear = linear_of(built, name)
    # all before it are final, so the finished model shows the inputs it was solved with
    hessian = compute_gram(inputs_of(built, linear, windows)).double()
    codec = AffineCodec(3, 16)
    weight = _weight(tmp_path, f"model.{name}.weight")
    expected = solve_weight_rows(weight, factorize_hessian(hessian, 16), codec)
    same = (linear.packed == expected).all(1)
    assert same.float().mean() > 0.9  # sums in float and in integers differ in the last bits


def _weight(directory: Path, name: str) -> Tensor:
    return load_file(directory / "base" / "model.safetensors")[name]


def test_a_sample_far_above_the_first_changes_the_unit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = built_of(tmp_path)
    windows = load_calibration_sequences(built.setup, World())
    solve_gptq_codes(built.setup.skeleton, built.engine, windows, World())
    expected = {n: p.clone() for n, p in built.model.named_parameters() if n.endswith(".packed")}
    # as if the first sample had been very small: its sum is void, and taken again
    monkeypatch.setattr(block_loop, "find_largest_entry", lambda own: 1e-9)
    again = built_of(tmp_path)
    solve_gptq_codes(again.setup.skeleton, again.engine, windows, World())
    for name, packed in expected.items():
        assert (again.get_parameter(name) == packed).float().mean() > 0.99, name


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    built = built_of(tmp_path)
    windows = load_calibration_sequences(built.setup, World())
    built.model.model.embed_tokens.weight.data[int(windows[1, 3])] = float("inf")
    with pytest.raises(UserError, match=r"infinite or NaN inputs for model\.layers\.0\.self_attn"):
        solve_gptq_codes(built.setup.skeleton, built.engine, windows, World())


def test_windows_are_deterministic_and_capped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = built_of(tmp_path, calibration_samples=500, calibration_tokens=4096)
    with caplog.at_level(logging.WARNING, "dist_peft"):
        windows = load_calibration_sequences(built.setup, World())
    assert windows.shape[1] == built.setup.skeleton.max_positions == 64
    assert f"text for {len(windows)} calibration sequences of 64 tokens, not for 500" in caplog.text
    assert torch.equal(windows, load_calibration_sequences(built.setup, World()))
    other = built_of(tmp_path, seed=7, calibration_samples=500, calibration_tokens=4096)
    assert not torch.equal(windows, load_calibration_sequences(other.setup, World()))
