"""Experts of mixtures in every packed format: decoded as the format's own library does, and read by
shares.

Those of ``transformers``' FP8 and gpt-oss' MXFP4 are in ``test_fp8_linears`` and
``test_mxfp4_stacks``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.core.span import Span, row_span
from dist_peft.model.experts import ExpertStack
from dist_peft.quant.ordered_stacks import OrderedStackCodec
from dist_peft.store.reader import RowReader
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
from tests.support.prequantized_models import load

Save = Callable[[Path, Path], Path]
Tensors = dict[str, Tensor]
CASES: dict[str, Save] = {
    "gptq, act-order": partial(packed.save_gptq, act_order=True),
    "gptq": partial(packed.save_gptq, version=1),
    "awq": packed.save_awq,
    "pack-quantized": partial(packed.save_compressed, dtype=torch.float16),
    "pack-quantized, symmetric": partial(
        packed.save_compressed, symmetric=True, per_row=True, dtype=torch.float16
    ),
    "fp8, channel": save_compressed_fp8,
    "fp8, block": partial(save_compressed_fp8, strategy="block"),
    "fp8, tiles": partial(save_fp8, tile=(24, 32)),
    "nvfp4": save_compressed_fp4,
    "mxfp4": partial(save_compressed_fp4, kind="mxfp4"),
}


def decode_gptq(tensors: Tensors, first_version: bool) -> Tensor:
    """``(code - zero[g_idx]) * scale[g_idx]``, as GPTQ's libraries decode."""
    codes = packed.unpack(tensors["qweight"].T.contiguous(), 4)
    zero = (packed.unpack(tensors["qzeros"], 4) + first_version) % 16
    groups = tensors["g_idx"].long()
    return (codes - zero[groups].T) * tensors["scales"].float()[groups].T


def decode_awq(tensors: Tensors) -> Tensor:
    """Nibbles 0 4 1 5 2 6 3 7 of a word are eight neighbouring rows."""

    def unpack(words: Tensor) -> Tensor:
        nibbles = torch.stack([words >> 4 * place & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)], -1)
        return nibbles.flatten(1).float()

    zero, scale = unpack(tensors["qzeros"]), tensors["scales"].float()
    wide = (t.repeat_interleave(packed.GROUP, 0) for t in (zero, scale))
    zero, scale = wide
    return ((unpack(tensors["qweight"]) - zero) * scale).T


def decode_fp8(tensors: Tensors) -> Tensor:
    """A scale for each tile of 24 x 32."""
    weight, scale = tensors["weight"].float(), tensors["weight_scale_inv"]
    wide = scale.repeat_interleave(24, 0).repeat_interleave(32, 1)
    return weight * wide[: len(weight), : weight.shape[1]]


def decompress(tensors: Tensors, directory: Path) -> Tensor:
    """By compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    settings = packed.read_config(directory)["quantization_config"]
    weights = settings["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    return compressor.decompress(dict(tensors), scheme)["weight"]


def decode(name: str, tensors: Tensors, directory: Path) -> Tensor:
    if name.startswith("gptq"):
        return decode_gptq(tensors, name == "gptq")
    if name == "awq":
        return decode_awq(tensors)
    return decode_fp8(tensors) if name == "fp8, tiles" else decompress(tensors, directory)


def list_stacks(model: torch.nn.Module) -> list[ExpertStack]:
    return [m for m in model.modules() if isinstance(m, ExpertStack)]


def read_in_parts(directory: Path, stack: ExpertStack, own_bytes: int, edges: int) -> None:
    """Rows of two and three ranks are those of one, of which each reads its share alone."""
    assert stack.stored is not None
    skeleton = load(directory)
    rows = len(stack.packed)
    with RowReader(skeleton.index) as reader:
        for ranks in (2, 3):
            for rank in range(ranks):
                span, before = row_span(rows, ranks, rank), reader.bytes_read
                part = stack.stored.read_packed_rows(reader, span)
                assert torch.equal(part, stack.packed[span.slice])
                share = own_bytes * len(span) / rows
                assert reader.bytes_read - before <= share + edges, (ranks, rank)
        assert not len(stack.stored.read_packed_rows(reader, Span(0, 0)))


TURNS = [
    pytest.param(name, marks=pytest.mark.turn(number % 2, 2)) for number, name in enumerate(CASES)
]
"""Formats whose linears are compared in every turn."""


@pytest.mark.parametrize("name", TURNS)
def test_experts_are_decoded_as_by_their_library_and_read_by_shares(
    name: str, tmp_path: Path
) -> None:
    if CASES[name] is not packed.save_awq and name not in ("gptq", "fp8, tiles"):
        pytest.importorskip("compressed_tensors")
    plain = save_tokenized(mixture("qwen3_moe"), tmp_path / "plain")
    directory = CASES[name](plain, tmp_path / "base")
    files = load_file(directory / "model.safetensors")
    stack = list_stacks(load(directory).model)[0]
    dense = stack.dequantize_weight(torch.float32)
    own_bytes = edges = 0
    for piece in stack.pieces:
        stem = piece.name.removesuffix("weight")
        own = {n.removeprefix(stem): t for n, t in files.items() if n.startswith(stem)}
        wanted = decode(name, own, directory)
        found = dense[piece.span.slice].to(wanted.dtype)  # some libraries decode to 16 bits
        assert torch.equal(found, wanted), piece.name
        small = {"g_idx", "weight_shape", "weight_global_scale"}
        own_bytes += sum(t.nbytes for n, t in own.items() if n not in small)
        # whole words and tiles at the two ends, and small tensors of each weight
        ends = [
            t.nbytes // len(t) if n.startswith("weight") else 4 * len(t) for n, t in own.items()
        ]
        edges = max(edges, 2 * sum(ends))
        edges += sum(t.nbytes for n, t in own.items() if n in small)
    assert isinstance(stack.codec, OrderedStackCodec) == (name == "gptq, act-order")
    read_in_parts(directory, stack, own_bytes, edges)


def test_gpt_oss_is_read_by_shares(tmp_path: Path) -> None:
    """Exactly its rows: codes and exponents of a row lie together."""
    directory = save_mxfp4(save_tokenized(GPT_OSS, tmp_path / "plain"), tmp_path / "base")
    stack = list_stacks(load(directory).model)[0]
    read_in_parts(directory, stack, len(stack.packed) * (64 // 2 + 64 // 32), 0)
