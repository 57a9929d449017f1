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
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.export_limits import ExportContent, ExportLimits
from dist_peft.adapters.low_rank.zero_points import measure_lost_share
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.export_format import (
    BITS,
    GROUP_SIZE,
    ExportOption,
    PackedExport,
    PlannedExport,
)
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify_consumer import run_plain_transformers
from dist_peft.export.verify_formats import ProcessConsumer, TransformersConsumer
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.store.writer import TensorSpec

__all__ = [
    "CompressedTensorsExport",
    "CompressedTensorsPacker",
    "GptqExport",
    "GptqPacker",
    "IntegerZeroExport",
    "IntegerZeroPacker",
    "quantize_integer_zeros",
]


def quantize_integer_zeros(
    walk: MergedWeights, weight: BaseWeight, span: Span, codec: AffineCodec
) -> AffineParts:
    """Return rows with integer zeros: uint8 codes [n, in], float16 scales, uint8 zeros.

    Padding is dropped. In the states ``base`` and ``trained`` the parts are those of training; in
    ``codes`` the zeros include the adapter, *rounded*; in the other states ``codec`` re-quantizes
    merged rows.

    Raises:
        UserError: the zeros must be kept (``base``, ``trained``), but are not integers.
    """
    if walk.state in ("codes", "base", "trained"):
        parts = walk.read_affine_parts(weight, span)
    else:
        parts = codec.split_packed_rows(
            codec.quantize_to_packed(walk.read_merged_rows(weight, span)), weight.num_columns
        )
    own = parts.zero.float()
    zero = own.round().clamp(0, 2**codec.bits - 1)
    if walk.state != "codes" and not torch.equal(zero, own):
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


class IntegerZeroPacker:
    """Bits, groups and the type of scales; ``dtype`` is that of the stored ones."""

    row_multiple = 32  # zeros of 32 rows are whole words

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None:
        self.codec, self.dtype = codec, dtype

    def _fits_word_size(self, length: int) -> bool:
        return length % self.codec.group_size == 0 and length % 32 == 0

    def _count_groups(self, weight: BaseWeight) -> int:
        return weight.num_columns // self.codec.group_size


class CompressedTensorsPacker(IntegerZeroPacker):
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


class GptqPacker(IntegerZeroPacker):
    """Pack linears in GPTQ's ``checkpoint_format: gptq_v2``.

    Args:
        codec: bits and group size; quantizes merged rows.
        dtype: unused by the format, whose scales are float16.
    """

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        self._parts: dict[str, list[AffineParts]] = {}  # by weight: several are packed at a time

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
        collected = self._parts.setdefault(weight.name, [])
        collected.append(AffineParts(words.T, parts.scale.half().T, zeros.T))
        if span.stop < weight.num_rows:
            return
        words, scale, zeros = (torch.cat(part, 1) for part in zip(*collected, strict=True))
        del self._parts[weight.name]
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


MERGE = ExportOption(
    "merge", "one merged model instead of base and adapter", {"action": "store_true"}
)
LOSSY = ExportOption(
    "lossy", "allow --merge, which rounds most of the adapter away", {"action": "store_true"}
)


class IntegerZeroExport(PackedExport):
    """An integer base unchanged, with a separate adapter; ``--merge --lossy`` re-quantizes."""

    options: ClassVar[tuple[ExportOption, ...]] = (BITS, GROUP_SIZE, MERGE, LOSSY)
    packer: ClassVar[type[GptqPacker] | type[CompressedTensorsPacker]]

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        return "merged" if options.get(MERGE.key) else "separate"

    def get_run_content(self, options: Mapping[str, Any], limits: ExportLimits) -> ExportContent:
        return "merged" if limits.trained_codes else self.get_content(options)

    def find_idle_options(self, options: Mapping[str, Any]) -> list[str]:
        idle = options.get(LOSSY.key) and not options.get(MERGE.key)
        return ["--lossy has no effect without --merge"] if idle else []

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        rows = run.codec.affine_rows
        if rows is None:
            return "needs an integer base with a separate adapter (or --merge --lossy)"
        return None if rows.has_integer_zeros else "hqq produces zeros that are not integers"

    def explain_no_adapter(self) -> str:
        return f"{super().explain_no_adapter()}, another format, or --merge --lossy"

    def write_export(self, job: ExportSpec) -> ExportResult:
        merge = bool(job.options.get(MERGE.key)) and job.codes_state != "trained"
        if merge and not job.options.get(LOSSY.key):
            raise UserError(
                f"this format has integer zeros: {_describe_merge_loss(job)}. Leave out --merge to "
                "get base and separate adapter, which loses nothing; or add --lossy to merge "
                "nevertheless"
            )
        codec = job.make_target_codec(64)
        # codes were chosen with fp16 scales; products are exact in float32
        exact_dtype = job.compute_dtype == torch.float32
        packer = self.packer(codec, torch.float32 if exact_dtype else torch.float16)
        size = f"{codec.bits} bits in groups of {codec.group_size}"
        if merge:
            how = f"merged with integer zeros: {size}"
            return self.write_directory(job, job.merge_state, packer, how)
        if job.trained_codes:
            self._require_trained_codes(job)
            how = f"the trained codes, {size}"
            return self.write_directory(job, "trained", packer, how, exact=True)
        self._check_base_kept(job, codec)
        how = f"base as trained, {size}; separate adapter"
        return self.write_directory(job, "base", packer, how, exact=True)

    def _require_trained_codes(self, job: ExportSpec) -> None:
        if job.integer_codec is None:
            raise UserError(
                "this format has integer codes, and the run was trained through another quantizer "
                "(base.quant): choose bnb-nf4, or add --merge --lossy to quantize the trained "
                "model again"
            )

    def _check_base_kept(self, job: ExportSpec, codec: AffineCodec) -> None:
        """Check that there is an integer base, which ``codec`` describes.

        Raises:
            UserError: there is none, or options ask for another codec.
        """
        if job.integer_codec is None:
            with job.open_weights("original"):
                pass  # raises first for a base that no quantized format supports
            raise UserError(
                "this format keeps an integer base (base.quant.kind: int) with a separate adapter, "
                "and this run has none. Choose bnb-nf4 or another format, or add --merge --lossy "
                "to quantize the merged model to integers"
            )
        if codec != job.integer_codec:
            raise UserError(
                f"the base is kept unchanged, {job.integer_codec.bits} bits in groups of "
                f"{job.integer_codec.group_size}; leave out --bits and --group-size"
            )


class GptqExport(IntegerZeroExport):
    """GPTQ, in the layout gptq_v2."""

    name = "gptq"
    keeps = "the integer base unchanged; separate adapter"
    loads_with = "transformers with gptqmodel"
    packer = GptqPacker
    consumer = ProcessConsumer(
        "gptq",
        run_plain_transformers,
        "gptqmodel",
        "DIST_PEFT_GPTQ_PYTHON",
        "pip install gptqmodel optimum",
        note="; it may compile kernels first",
        options=("float32", "gptqmodel"),
    )

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        return super().find_packing_obstacle(run, options) or run.limits.gptq_linears

    def _check_base_kept(self, job: ExportSpec, codec: AffineCodec) -> None:
        if job.integer_codec is not None and not _is_loaded_on_gptq_linears(job.adapter_dir):
            raise UserError(
                "this format keeps the adapter separate from GPTQ linears, on which PEFT does not "
                "support this method; choose compressed-tensors or hf-bf16"
            )
        super()._check_base_kept(job, codec)


class CompressedTensorsExport(IntegerZeroExport):
    """``pack-quantized`` of compressed-tensors."""

    name = "compressed-tensors"
    keeps = "the integer base unchanged; separate adapter"
    loads_with = "transformers with compressed-tensors"
    packer = CompressedTensorsPacker
    consumer = TransformersConsumer(
        needs=("compressed_tensors", "peft"),
        reports=("compressed-tensors",),
        quantization=("CompressedTensorsConfig", {"dequantize": True}),
    )


def _is_loaded_on_gptq_linears(adapter_dir: Path) -> bool:
    known = find_format(read_adapter_directory(adapter_dir, values=False).config)
    return known is not None and known.on_gptq_linears


def _describe_merge_loss(job: ExportSpec) -> str:
    """Describe the loss of a merge into integer zeros."""
    if not job.pooled or job.integer_codec is None:
        return (
            "merged weights are re-quantized, and changes by less than half a quantization step "
            "are rounded away"
        )
    with job.open_weights("base") as walk:
        share = measure_lost_share(walk.iterate_group_changes(), job.integer_codec.bits)
    return f"rounding its merged zeros loses {share:.1%} of this run's adapter (measured)"
