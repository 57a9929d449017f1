"""``bnb-nf4``: merged rows in bitsandbytes' NF4, a prequantized model for ``transformers``.

A weight ``[out, in]`` is split into blocks of 64 along its flattened rows (a block may cross rows).
Tensors of a linear, as ``bitsandbytes.functional.QuantState`` stores them::

    weight                               uint8 [out * in / 2, 1]   even element in the high nibble
    weight.quant_map                     float32 [16]              the 16 levels
    weight.absmax                        float32 [blocks], or with double quantization:
    weight.absmax                        uint8 [blocks]            codes into nested_quant_map
    weight.nested_absmax                 float32 [blocks / 256]
    weight.nested_quant_map              float32 [256]
    weight.quant_state.bitsandbytes__nf4 uint8 [n]                 JSON: shape, types, offset

The offset of double quantization is the mean of the absmax of the whole tensor, so that these
(4 bytes a block) are kept until the weight is complete; only a chunk of the weight is in memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.quant.nf4 import NF4_LEVELS, Nf4Codec
from dist_peft.store.writer import TensorSpec

__all__ = [
    "BnbNf4Packer",
    "build_dynamic_map",
    "encode_quant_state",
    "make_bnb_settings",
    "make_quant_state_name",
    "quantize_absmax",
]

BLOCK, NESTED_BLOCK = 64, 256
_CODEC = Nf4Codec(BLOCK, double_quant=False)


class BnbNf4Packer:
    """Pack linears in bitsandbytes' NF4.

    Args:
        double_quant: store the scales of the blocks in 8 bits.
        dtype: type that bitsandbytes dequantizes to and computes in.
    """

    row_multiple = 2 * BLOCK  # whole bytes and blocks in every chunk but the last

    def __init__(self, double_quant: bool, dtype: torch.dtype) -> None:
        self.double_quant, self.dtype = double_quant, dtype
        self._absmax: dict[str, list[Tensor]] = {}  # by weight: several are packed at a time

    def can_pack(self, weight: BaseWeight) -> bool:
        """Return True: blocks may cross rows."""
        return True

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        elements, name = weight.num_rows * weight.num_columns, weight.written
        blocks = -(-elements // BLOCK)
        specs = [
            TensorSpec(name, torch.uint8, (-(-elements // 2), 1)),
            TensorSpec(f"{name}.quant_map", torch.float32, (16,)),
            TensorSpec(
                f"{name}.absmax", torch.uint8 if self.double_quant else torch.float32, (blocks,)
            ),
        ]
        if self.double_quant:
            specs += [
                TensorSpec(f"{name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
                TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)),
            ]
        state = self._encode_padded_state(weight, 0.0)
        return [*specs, TensorSpec(make_quant_state_name(weight), torch.uint8, tuple(state.shape))]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        flat = walk.read_merged_rows(weight, span).to(self.dtype).float().flatten()
        start, elements = span.start * weight.num_columns, flat.numel()
        blocks = functional.pad(flat, (0, -elements % BLOCK)).view(-1, BLOCK)
        payload, absmax = _CODEC.split_packed_rows(_CODEC.quantize_to_packed(blocks), BLOCK)
        self._absmax.setdefault(weight.name, []).append(absmax.flatten())
        codes = payload.reshape(-1, 1)[: -(-elements // 2)]
        yield TensorPiece(weight.written, codes, start // 2)
        if span.stop == weight.num_rows:
            yield from self._pack_collected_weight(weight)

    def _pack_collected_weight(self, weight: BaseWeight) -> Iterator[TensorPiece]:
        absmax = torch.cat(self._absmax.pop(weight.name))
        name, offset = weight.written, 0.0
        yield TensorPiece(f"{name}.quant_map", torch.tensor(NF4_LEVELS), 0)
        if self.double_quant:
            codes, nested, offset = quantize_absmax(absmax)
            yield TensorPiece(f"{name}.absmax", codes, 0)
            yield TensorPiece(f"{name}.nested_absmax", nested, 0)
            yield TensorPiece(f"{name}.nested_quant_map", build_dynamic_map(), 0)
        else:
            yield TensorPiece(f"{name}.absmax", absmax, 0)
        yield TensorPiece(
            make_quant_state_name(weight), self._encode_padded_state(weight, offset), 0
        )

    def _encode_padded_state(self, weight: BaseWeight, offset: float) -> Tensor:
        """Return ``encode_quant_state`` of a weight, of a length that does not depend on
        ``offset``.

        Tensors are planned before the offset is known.
        """
        nested: dict[str, Any] | None = None
        if self.double_quant:
            nested = {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
        return encode_quant_state(weight, BLOCK, self.dtype, nested)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        return make_bnb_settings(walk, unpacked, double_quant=self.double_quant, dtype=self.dtype)


def encode_quant_state(
    weight: BaseWeight,
    block: int,
    dtype: torch.dtype,
    nested: Mapping[str, Any] | None = None,
    kind: str = "nf4",
) -> Tensor:
    """Encode a weight's quantization state as JSON bytes, ``uint8 [n]``.

    Args:
        weight: weight of a linear.
        block: number of elements that share a scale.
        dtype: type that bitsandbytes dequantizes to.
        nested: keys of double quantization, with ``nested_offset``, whose value does not change
            the length.
        kind: nf4 or fp4.
    """
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [weight.num_rows, weight.num_columns],
        **(nested or {}),
    }
    padding = 32 - len(repr(nested["nested_offset"])) if nested else 0
    text = json.dumps(state).encode() + b" " * padding
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def make_bnb_settings(
    walk: MergedWeights,
    unpacked: list[str],
    *,
    double_quant: bool,
    dtype: torch.dtype,
    kind: str = "nf4",
) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a model in bitsandbytes' 4 bits, for ``config.json``.

    Args:
        walk: the exported weights.
        unpacked: paths of linears of the blocks that are not quantized.
        double_quant: the scales of the blocks are stored in 8 bits.
        dtype: type that bitsandbytes computes in.
        kind: nf4 or fp4.
    """
    return {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list_unpacked_linears(walk, unpacked),
        }
    }


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Quantize scales a second time, as bitsandbytes' double quantization does.

    Blocks of 256 values ``absmax - mean`` are divided by their largest magnitude and rounded to the
    nearest entry of ``build_dynamic_map``.

    Returns:
        codes uint8 [n], largest magnitudes float32 [ceil(n / 256)], the mean.
    """
    offset = absmax.mean()
    centred = absmax - offset
    blocks = functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    entries = build_dynamic_map()
    borders = (entries[1:] + entries[:-1]) / 2
    codes = torch.bucketize(scaled, borders).to(torch.uint8)
    return codes.flatten()[: len(absmax)], largest, float(offset)


def build_dynamic_map() -> Tensor:
    """Return bitsandbytes' 8-bit map, ascending float32 [256].

    Sign, a decimal exponent of up to 7 places, the other bits linear in [0.1, 1] (Dettmers 2016,
    "8-bit approximations for parallelism in deep learning").
    """
    entries = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (borders[:-1] + borders[1:]) / 2
        magnitudes = (10 ** (exponent - 6) * means).tolist()
        entries += [*magnitudes, *(-m for m in magnitudes)]
    return torch.tensor(sorted(entries), dtype=torch.float32)


def make_quant_state_name(weight: BaseWeight, kind: str = "nf4") -> str:
    """Return the name of the tensor that holds the weight's ``encode_quant_state``."""
    return f"{weight.written}.quant_state.bitsandbytes__{kind}"
