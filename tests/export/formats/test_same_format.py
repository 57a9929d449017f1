"""Bases of every format that were trained through their quantizer, written in the same format.

The rows of the export, read again, are those of training, bit for bit: codes that moved, on the
scales and zeros of the base's files. The format's own library computes the trained logits where it
runs in this process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.adapters.export_limits import ExportLimits
from dist_peft.core.config.run import LoraConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.registry import FORMATS, export_model
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.model.skeleton import Skeleton, build_skeleton
from tests.support import packed
from tests.support.export_runs import mixture
from tests.support.packed_floats import (
    GPT_OSS,
    save_compressed_fp4,
    save_compressed_fp8,
    save_fp8,
    save_mxfp4,
    save_tokenized,
)
from tests.support.packed_runs import make_packed_run
from tests.support.prequantized_models import load

Save = Callable[[Path, Path], Path]
EXPERTS = {"target_modules": ["gate_up_proj", "down_proj"]}


@dataclass(frozen=True)
class Case:
    """``loads``: the library runs here; ``experts``: of which model; ``bound``: of the logits'
    error, as NVFP4 and some experts are decompressed to 16 bits."""

    format: str
    save: Save
    experts: Any = None
    loads: bool = True
    bound: float = 1e-5
    adapter: dict[str, Any] = field(default_factory=dict)


def mixed(format: str, save: Save, **options: Any) -> Case:
    return Case(format, save, mixture("qwen3_moe"), adapter=EXPERTS, **options)


half = partial(packed.save_compressed, dtype=torch.float16)
CASES: dict[str, Case] = {
    "gptq": Case("gptq", packed.save_gptq, loads=False),
    "gptq, act-order": Case("gptq", partial(packed.save_gptq, act_order=True), loads=False),
    "awq": Case("awq", packed.save_awq, loads=False),
    "compressed-tensors": Case("compressed-tensors", half),
    "fp8 tiles": Case("fp8", partial(save_fp8, tile=(16, 32))),
    "fp8 channel": Case("fp8", save_compressed_fp8),
    "fp8 block": Case("fp8", partial(save_compressed_fp8, strategy="block")),
    "fp8 tensor": Case("fp8", partial(save_compressed_fp8, strategy="tensor")),
    "mxfp4": Case("mxfp4", partial(save_compressed_fp4, kind="mxfp4")),
    "nvfp4": Case("nvfp4", save_compressed_fp4, bound=0.02),
    "bnb nf4": Case("bnb-nf4", partial(packed.save_bnb, double_quant=True), loads=False),
    "bnb fp4": Case(
        "bnb-fp4", partial(packed.save_bnb, double_quant=False, kind="fp4"), None, False
    ),
    "llm.int8": Case("bnb-int8", partial(packed.save_bnb, double_quant=False, kind="int8")),
    "experts, gpt-oss": Case("mxfp4", save_mxfp4, GPT_OSS, adapter=EXPERTS),
    "experts, fp8 tiles": mixed("fp8", partial(save_fp8, tile=(16, 32))),
    "experts, mxfp4": mixed("mxfp4", partial(save_compressed_fp4, kind="mxfp4"), bound=0.02),
    "experts, nvfp4": mixed("nvfp4", save_compressed_fp4, bound=0.03),
    "experts, gptq": mixed("gptq", packed.save_gptq, loads=False),
    "experts, gptq, act-order": mixed(
        "gptq", partial(packed.save_gptq, act_order=True), loads=False
    ),
    "experts, compressed-tensors": mixed(
        "compressed-tensors", partial(half, symmetric=True), bound=0.02
    ),
    "experts, awq": mixed("awq", packed.save_awq, loads=False),
}


def list_packed_rows(skeleton: Skeleton) -> dict[str, tuple[FrozenWeight, Tensor]]:
    return {
        name: (module, module.packed.detach())
        for name, module in skeleton.model.named_modules()
        if isinstance(module, FrozenWeight) and module.stored is not None
    }


ALTERNATE = {
    "gptq": 0,
    "experts, gptq": 1,
    "gptq, act-order": 1,
    "experts, gptq, act-order": 0,
    "awq": 1,
    "experts, awq": 0,
    "fp8 tiles": 0,
    "experts, fp8 tiles": 1,
    "fp8 channel": 1,
    "fp8 block": 0,
    "fp8 tensor": 1,
    "mxfp4": 1,
    "experts, mxfp4": 0,
    "nvfp4": 0,
    "experts, nvfp4": 1,
    "bnb nf4": 0,
    "bnb fp4": 1,
}
"""Linears of a format and its experts alternate."""
TURNS = [
    pytest.param(name, marks=[pytest.mark.turn(ALTERNATE[name], 2)] if name in ALTERNATE else [])
    for name in CASES
]


@pytest.mark.parametrize("name", TURNS)
def test_trained_codes_are_written_as_the_base_has_them(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if case.experts is None:
        plain = packed.save_plain(tmp_path / "plain", intermediate_size=128)
    else:
        plain = save_tokenized(case.experts, tmp_path / "plain")
    base = case.save(plain, tmp_path / "base")
    run = make_packed_run(tmp_path, base, plain, **case.adapter)
    exported = export_model(case.format, run.job(tmp_path / "out", trained_codes=True))
    assert exported.exact
    before, after = (list_packed_rows(load(path)) for path in (base, tmp_path / "out"))
    assert before.keys() == after.keys() and before
    moved = 0
    with open_merged_weights(run.base, base, run.adapter_dir, "trained") as walk:
        for weight in walk.weights:
            if weight.linear is None or weight.linear.stored is None:
                continue
            path = weight.path.removesuffix(".weight")
            (old, was), (new, rows) = before[path], after[path]
            assert old.codec == new.codec
            for span in walk.iterate_spans(weight):
                own = weight.span_in_linear(span).slice
                assert torch.equal(rows[own], walk.read_packed_rows(weight, span)), weight.name
            statistics = (
                c.read_statistics(p, old.in_features)
                for c, p in ((old.codec, was), (new.codec, rows))
            )
            assert torch.equal(*statistics)
            moved += int((was != rows).sum())
    assert moved > 1000
    settings = packed.read_config(tmp_path / "out")["quantization_config"]
    own = packed.read_config(base)["quantization_config"]
    if "act-order" in name:
        assert settings["desc_act"] is True
    if "fp8 tiles" in name:
        assert settings["weight_block_size"] == own["weight_block_size"]
    if case.loads:
        found = run.verify(case.format, exported, trained_codes=True)[1]
        assert found.changed and found.relative < case.bound, FORMATS[case.format].loads_with


@pytest.fixture
def in_act_order(tmp_path: Path) -> tuple[Path, Path]:
    """A base and the plain one that it was made of."""
    plain = packed.save_plain(tmp_path / "plain")
    return packed.save_gptq(plain, tmp_path / "base", act_order=True), plain


def test_a_base_in_act_order_is_kept_by_gptq_with_a_separate_adapter(
    in_act_order: tuple[Path, Path], tmp_path: Path
) -> None:
    base, plain = in_act_order
    run = make_packed_run(tmp_path, base, plain, through_quantizer=False)
    assert export_model("gptq", run.job(tmp_path / "out")).exact
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert packed.read_config(tmp_path / "out")["quantization_config"]["desc_act"] is True


@pytest.mark.parametrize("name", ["compressed-tensors", "awq", "hf-metal", "gguf"])
def test_formats_without_an_order_of_columns_refuse_the_trained_codes(
    name: str, in_act_order: tuple[Path, Path], tmp_path: Path
) -> None:
    """When they are written, and before the training."""
    if name == "gguf":
        pytest.importorskip("gguf")
    base, plain = in_act_order
    run = make_packed_run(tmp_path, base, plain)
    with pytest.raises(UserError, match="columns in act-order, which the format has not"):
        export_model(name, run.job(tmp_path / "out", trained_codes=True))
    config = RunConfig(
        base=run.base, adapter=LoraConfig(through_quantizer=True), data={"train": ["a.jsonl"]}
    )
    skeleton, limits = build_skeleton(run.base, base), ExportLimits(trained_codes=True)
    planned = PlannedExport(config, skeleton, base, limits)
    reason = FORMATS[name].find_obstacle(planned, {})
    assert reason is not None and "act-order" in reason
    assert FORMATS["gptq"].find_obstacle(planned, {}) is None
