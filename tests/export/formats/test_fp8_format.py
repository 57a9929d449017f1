"""FP8 decoded tile by tile, and loaded by transformers and compressed-tensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.fp8_format import quantize_fp8_tiles
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import FakeRun, make_run, mark_as_trained_through, mixture
from tests.support.packed_floats import from_fp8, save_fp8, to_fp8

OTHER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("fp8"), None)


@pytest.mark.parametrize("tile", [(16, 32), (1, 64)])
def test_tiles_are_those_of_a_loop(tile: tuple[int, int]) -> None:
    weights = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_fp8_tiles(weights, *tile)
    slow, factors = to_fp8(weights, *tile)
    assert torch.equal(scales, factors)
    assert torch.equal(codes.view(torch.uint8), slow.view(torch.uint8))
    zeros = quantize_fp8_tiles(torch.zeros(16, 32), 16, 32)
    assert not zeros[0].float().any() and zeros[1].tolist() == [[1.0]]


@pytest.mark.parametrize("settings", [{"group_size": 32}, {"scales": "row"}], ids=str)
def test_reader_computes_with_merged_rows(
    settings: dict[str, Any], dense: FakeRun, tmp_path: Path
) -> None:
    exported = export_model("fp8", dense.job(tmp_path / "out", **settings))
    assert exported.written.packed == exported.written.merged == 14 and not exported.exact
    assert dense.verify("fp8", exported)[1].relative < 0.3
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in dense.trained.items():
        stem = name.removesuffix(".weight")
        if "proj" not in name:
            continue
        tile = (32, 32) if "group_size" in settings else (1, weight.shape[1])
        scale = tensors[f"{stem}.weight_scale{'_inv' * ('group_size' in settings)}"]
        codes, _ = to_fp8(weight, *tile)
        found = from_fp8(tensors[name], scale, *tile)
        # a value at a border between two codes may be merged in another order
        torch.testing.assert_close(found, from_fp8(codes, scale, *tile), rtol=0.07, atol=1e-4)


def test_a_part_of_a_tile_stays_dense(dense: FakeRun, tmp_path: Path) -> None:
    """transformers takes tiles from the shape of the scales: parts would be decoded wrongly."""
    exported = export_model("fp8", dense.job(tmp_path / "out", group_size=64))
    assert len(exported.written.unpacked) == 10  # 96 and 32 are no multiples
    assert dense.verify("fp8", exported)[1].relative < 0.3


def test_experts(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=mixture("mixtral"))
    exported = export_model("fp8", run.job(tmp_path / "out", group_size=32))
    assert exported.written.packed == 2 * (4 + 3 * 4)
    assert run.verify("fp8", exported)[1].relative < 0.5
    with pytest.raises(UserError, match="choose a smaller --group-size"):
        export_model("fp8", run.job(tmp_path / "other"))


def test_codes_of_the_base_are_copied_where_nothing_was_trained(
    dense: FakeRun, tmp_path: Path
) -> None:
    """Bytes of a base as DeepSeek-V3 is published, in the tiles of the export."""
    base = save_fp8(dense.directory, tmp_path / "fp8", (32, 32))
    file = base / "model.safetensors"
    before = load_file(file)
    adapter = tmp_path / "adapter"
    public = read_adapter_directory(dense.adapter_dir)
    kept = {name: t for name, t in public.tensors.items() if ".q_proj." in name}
    config = {**public.config, "target_modules": ["q_proj"]}
    write_adapter_directory(adapter, PublicAdapter(config, kept), {})
    settings = {"path": str(base), "compute_dtype": "float32"}
    run = replace(dense, base=type(dense.base)(**settings), directory=base, adapter_dir=adapter)
    export_model("fp8", run.job(tmp_path / "out", group_size=32))
    after = load_file(tmp_path / "out" / "model.safetensors")
    for ending in ("weight", "weight_scale_inv"):
        name = f"{OTHER}.{ending}"
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[changed].view(torch.uint8), after[changed].view(torch.uint8))


@pytest.mark.parametrize("group", [32, 2**16])
def test_trained_codes_are_those_of_the_codec(group: int, tmp_path: Path) -> None:
    """State ``trained``: W + s B A, encoded once; the reader decodes these values."""
    run = make_run(tmp_path, QuantConfig(kind="fp8", group_size=group))
    mark_as_trained_through(run)
    exported = export_model("fp8", run.job(tmp_path / "out", trained_codes=True))
    assert exported.exact and exported.written.packed == 14
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert how["quant_method"] == ("fp8" if group == 32 else "compressed-tensors")
    _, found = run.verify("fp8", exported)
    assert found.relative < 0.5  # the fake run's weights are decode(encode(W)) + s B A
    run.base = run.base.model_copy(update={"quant": QuantConfig()})
    with pytest.raises(UserError, match=r"keeps codes of base\.quant\.kind fp8"):
        export_model("fp8", run.job(tmp_path / "nf4", trained_codes=True))
