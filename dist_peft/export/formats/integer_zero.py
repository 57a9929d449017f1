"""Affine groups with integer zeros: shared by ``gptq``, ``awq`` and ``compressed-tensors``.

``w = (code - zero) * scale`` with a zero of ``bits`` bits, which cannot hold an adapter's change of
the zeros: an integer base is written unchanged, and the adapter is saved separately; or, with
``--merge --lossy``, merged rows are quantized again.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

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
from dist_peft.export.model_directory import WeightPacker
from dist_peft.quant.affine import AffineCodec, AffineParts

__all__ = ["IntegerZeroExport", "IntegerZeroPacker", "pack_along_rows", "quantize_integer_zeros"]


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
            f"{weight.name}), which base.quant.solver hqq and adapter.through_zeros produce, and "
            "this format has integer zeros: choose mlx, hf-metal or gguf"
        )
    return AffineParts(parts.codes[:, : weight.num_columns], parts.scale, zero.to(torch.uint8))


def pack_along_rows(numbers: Tensor, bits: int) -> Tensor:
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


MERGE = ExportOption(
    "merge", "one merged model instead of base and adapter", {"action": "store_true"}
)
LOSSY = ExportOption(
    "lossy", "allow --merge, which rounds most of the adapter away", {"action": "store_true"}
)


class IntegerPacker(WeightPacker, Protocol):
    """A packer that is made of a codec and the type of stored scales."""

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None: ...


class IntegerZeroExport(PackedExport):
    """An integer base unchanged, with a separate adapter; ``--merge --lossy`` re-quantizes."""

    options: ClassVar[tuple[ExportOption, ...]] = (BITS, GROUP_SIZE, MERGE, LOSSY)
    packer: ClassVar[type[IntegerPacker]]

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        return "merged" if options.get(MERGE.key) else "separate"

    def get_run_content(self, options: Mapping[str, Any], limits: ExportLimits) -> ExportContent:
        return "merged" if limits.trained_codes else self.get_content(options)

    def find_idle_options(self, options: Mapping[str, Any]) -> list[str]:
        idle = options.get(LOSSY.key) and not options.get(MERGE.key)
        return ["--lossy has no effect without --merge"] if idle else []

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        rows = run.codec.affine_rows
        if options.get(MERGE.key) and options.get(LOSSY.key):
            return None
        if rows is None:
            return "needs an integer base with a separate adapter (or --merge --lossy)"
        if run.limits.fractional_zeros:
            return "adapter.through_zeros trains zeros that are not integers"
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
