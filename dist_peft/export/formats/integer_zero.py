"""``gptq`` and ``compressed-tensors``: affine groups with integer zeros.

``w = (code - zero) * scale`` with a zero of ``bits`` bits, which cannot hold an adapter's change of
the zeros: an integer base is written unchanged, and the adapter is saved separately.

Tensors of a linear ``[out, in]``; words are int32, codes a dense LSB-first bit stream::

    compressed-tensors (pack-quantized)           gptq (gptq_v2: zeros are stored without offset)
    weight_packed      [out, in * bits / 32]      qweight [in * bits / 32, out]   along in
    weight_scale       [out, in / group]          scales  [in / group, out]       float16
    weight_zero_point  [out * bits / 32, in / g]  qzeros  [in / group, out * bits / 32]
    weight_shape       int64 [2]                  g_idx   [in]                    column -> group

GPTQ's tensors have ``out`` last, so that rows of a weight are their columns: the packed tensors of
one linear are assembled in memory (``bits / 16`` of its bf16 size).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.store.writer import TensorSpec

__all__ = ["CompressedTensorsPacker", "GptqPacker", "quantize_integer_zeros"]


def quantize_integer_zeros(
    walk: MergedWeights, weight: BaseWeight, span: Span, codec: AffineCodec
) -> AffineParts:
    """Return rows with integer zeros: uint8 codes [n, in], float16 scales, uint8 zeros.

    Padding is dropped. In the state ``base`` the parts are those of the base; in ``codes`` the
    zeros include the adapter, *rounded*; in the other states ``codec`` re-quantizes merged rows.

    Raises:
        UserError: the zeros of the base must be kept (state ``base``), but are not integers.
    """
    if walk.state in ("codes", "base"):
        parts = walk.read_affine_parts(weight, span)
    else:
        parts = codec.split_packed_rows(
            codec.quantize_to_packed(walk.read_merged_rows(weight, span)), weight.num_columns
        )
    own = parts.zero.float()
    zero = own.round().clamp(0, 2**codec.bits - 1)
    if walk.state == "base" and not torch.equal(zero, own):
        raise UserError(
            f"the base's zeros are fractions (such as {float(own[zero != own][0]):.3f} in "
            f"{weight.name}), which base.quant.solver hqq produces, and this format has integer "
            "zeros: choose mlx, hf-metal or gguf, or a base of solver rtn or gptq"
        )
    return AffineParts(parts.codes[:, : weight.num_columns], parts.scale, zero.to(torch.uint8))


def _pack_along_rows(numbers: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``[n, m]`` along dimension 0 to int32 ``[ceil(n * bits / 32), m]``."""
    rows = numbers.shape[0]
    padded = functional.pad(numbers.T, (0, -rows % 32))
    return pack_code_words(padded, bits, torch.int32).T[: -(-rows * bits // 32)].contiguous()


class _IntegerZeroPacker:
    row_multiple = 32  # zeros of 32 rows are whole words

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None:
        self.codec, self.dtype = codec, dtype

    def _fits_word_size(self, length: int) -> bool:
        return length % self.codec.group_size == 0 and length % 32 == 0

    def _count_groups(self, weight: BaseWeight) -> int:
        return weight.num_columns // self.codec.group_size


class CompressedTensorsPacker(_IntegerZeroPacker):
    """Pack linears as ``pack-quantized`` of compressed-tensors.

    Args:
        codec: bits and group size; quantizes merged rows.
        dtype: type of the stored scales.
    """

    def can_pack(self, weight: BaseWeight) -> bool:
        return self._fits_word_size(weight.num_columns)

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        bits, out, groups = self.codec.bits, weight.num_rows, self._count_groups(weight)
        stem = weight.name_stem
        return [
            TensorSpec(
                f"{stem}.weight_packed", torch.int32, (out, weight.num_columns * bits // 32)
            ),
            TensorSpec(f"{stem}.weight_scale", self.dtype, (out, groups)),
            TensorSpec(f"{stem}.weight_zero_point", torch.int32, (-(-out * bits // 32), groups)),
            TensorSpec(f"{stem}.weight_shape", torch.int64, (2,)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        bits, stem = self.codec.bits, weight.name_stem
        parts = quantize_integer_zeros(walk, weight, span, self.codec)
        words = pack_code_words(parts.codes, bits, torch.int32)
        yield TensorPiece(f"{stem}.weight_packed", words, span.start)
        yield TensorPiece(f"{stem}.weight_scale", parts.scale.to(self.dtype), span.start)
        zeros = _pack_along_rows(parts.zero, bits)
        yield TensorPiece(f"{stem}.weight_zero_point", zeros, span.start * bits // 32)
        if span.start == 0:
            yield TensorPiece(
                f"{stem}.weight_shape", torch.tensor([weight.num_rows, weight.num_columns]), 0
            )

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        weights = {
            "num_bits": self.codec.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": self.codec.group_size,
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": list_unpacked_linears(walk, unpacked),
            }
        }


class GptqPacker(_IntegerZeroPacker):
    """Pack linears in GPTQ's ``checkpoint_format: gptq_v2``.

    Args:
        codec: bits and group size; quantizes merged rows.
        dtype: unused by the format, whose scales are float16.
    """

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        self._parts: list[AffineParts] = []

    def can_pack(self, weight: BaseWeight) -> bool:
        return self._fits_word_size(weight.num_columns) and weight.num_rows % 32 == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        bits, out, groups = self.codec.bits, weight.num_rows, self._count_groups(weight)
        stem = weight.name_stem
        return [
            TensorSpec(f"{stem}.qweight", torch.int32, (weight.num_columns * bits // 32, out)),
            TensorSpec(f"{stem}.qzeros", torch.int32, (groups, out * bits // 32)),
            TensorSpec(f"{stem}.scales", torch.float16, (groups, out)),
            TensorSpec(f"{stem}.g_idx", torch.int32, (weight.num_columns,)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        bits, stem = self.codec.bits, weight.name_stem
        parts = quantize_integer_zeros(walk, weight, span, self.codec)
        words = pack_code_words(parts.codes, bits, torch.int32)
        zeros = _pack_along_rows(parts.zero, bits)
        self._parts.append(AffineParts(words.T, parts.scale.half().T, zeros.T))
        if span.stop < weight.num_rows:
            return
        words, scale, zeros = (torch.cat(part, 1) for part in zip(*self._parts, strict=True))
        self._parts.clear()
        yield TensorPiece(f"{stem}.qweight", words, 0)
        yield TensorPiece(f"{stem}.scales", scale, 0)
        yield TensorPiece(f"{stem}.qzeros", zeros, 0)
        index = torch.arange(weight.num_columns, dtype=torch.int32) // self.codec.group_size
        yield TensorPiece(f"{stem}.g_idx", index, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        how: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.codec.bits,
            "group_size": self.codec.group_size,
            "desc_act": False,
            "sym": False,
            "checkpoint_format": "gptq_v2",
            "true_sequential": True,
            "lm_head": False,
        }
        if unpacked:  # linears inside blocks: gptqmodel reads the first key, optimum the second
            how["dynamic"] = {f"-:^{path.replace('.', chr(92) + '.')}$": {} for path in unpacked}
            inside = {w.module_path for w in walk.weights if w.is_block_linear} - set(unpacked)
            how["modules_in_block_to_quantize"] = [sorted({_strip_block_prefix(p) for p in inside})]
        return {"quantization_config": how}


def _strip_block_prefix(path: str) -> str:
    """Return the path inside the block: ``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    names = path.split(".")
    last = max(i for i, name in enumerate(names) if name.isdigit())
    return ".".join(names[last + 1 :])
