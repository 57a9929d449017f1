"""compressed-tensors' NVFP4 and MXFP4: decoded as by the library, read by shares, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.codec import make_codec
from dist_peft.store.reader import RowReader
from tests.support import packed
from tests.support.packed_floats import save_compressed_fp4
from tests.support.prequantized_models import base_of, linears, load


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.save_plain(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_as_the_library_decompresses(kind: str, plain: Path, tmp_path: Path) -> None:
    directory = save_compressed_fp4(plain, tmp_path / "base", kind)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = packed.read_config(directory)["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(**settings)
    compressor = BaseCompressor.get_value_from_registry(f"{kind}-pack-quantized")
    files = load_file(directory / "model.safetensors")
    skeleton = load(directory)
    whole = linears(skeleton)
    assert skeleton.prequantized is not None and len(whole) == 14
    quant = skeleton.prequantized.quant_config
    for weight, linear in whole.items():
        assert linear.codec == make_codec(quant, torch.float32) and linear.codec.name == kind
        stem = weight.removesuffix("weight")
        state = {n.removeprefix(stem): t for n, t in files.items() if n.startswith(stem)}
        wanted = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(linear.dequantize_weight(wanted.dtype), wanted)
    skeleton = build_skeleton(base_of(directory), directory)
    with RowReader(skeleton.index) as reader:
        for name, linear in linears(skeleton).items():
            assert linear.stored is not None
            for span in (Span(0, 7), Span(7, linear.out_features), Span(3, 3)):
                before = reader.bytes_read
                part = linear.stored.read_packed_rows(reader, span)
                assert torch.equal(part, whole[name].packed[span.slice])
                row = linear.in_features // 2 + linear.in_features // quant.group_size
                wanted_bytes = len(span) * row + 4 * (kind == "nvfp4" and len(span) > 0)
                assert reader.bytes_read - before == wanted_bytes


def test_refused(plain: Path, tmp_path: Path) -> None:
    source = save_compressed_fp4(plain, tmp_path / "base")
    group = packed.read_config(source)["quantization_config"]["config_groups"]["group_0"]

    def with_weights(**changes: Any) -> dict[str, Any]:
        weights = {**group["weights"], **changes}
        return {"config_groups": {"group_0": {**group, "weights": weights}}}

    cases: list[tuple[dict[str, Any], str]] = [
        (with_weights(group_size=32), "nvfp4-pack-quantized with .*'group_size': 32"),
        (with_weights(symmetric=False), "without zero points is read"),
        (with_weights(dynamic=True), "has dynamic in its quantization_config"),
        ({"format": "mxfp4-pack-quantized"}, "'group_size': 16}; .*'group_size': 32"),
    ]
    for number, (settings, text) in enumerate(cases):
        directory = packed.copy(source, tmp_path / str(number))
        packed.change_settings(directory, **settings)
        with pytest.raises(UserError, match=text):
            load(directory)
    scale = "model.layers.0.self_attn.q_proj.weight_global_scale"
    packed.change_tensors(source, lambda tensors: tensors.update({scale: torch.zeros(1)}))
    with pytest.raises(UserError, match="a scale is not finite"):
        load(source)
