"""``mlx`` and ``hf-metal``: affine groups with float biases, for ``mlx-lm`` and ``transformers``.

Tensors of a linear ``[out, in]``, ``w = code * scale + bias``::

    mlx        weight uint32 [out, in * bits / 32]    scales [out, in / group]    biases [the same]
    hf-metal   weight        the same                 scales        the same      qbiases  the same

The codes are a dense LSB-first bit stream along ``in`` (``quant.pack``). MLX takes 2, 3, 4 and 8
bits in groups of 32, 64 or 128; ``transformers`` 2, 4 and 8 bits in any group size, so that 3-bit
codes are stored in 4 bits there. mlx-lm has the experts of a mixture in one tensor a projection,
``switch_mlp.NAME`` ``[experts, out, ...]``; for ``transformers`` each has its own. A linear whose
``in`` is not a multiple of the group size stays dense: MLX detects it by the absence of ``scales``,
``transformers`` by ``modules_to_not_convert``.

With the adapter in the zeros of an integer base (state ``codes``) or in its codes (``trained``),
scales and biases are float32 and nothing is rounded; merged rows are rounded to nearest
(``export.formats.groups``).
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.export_format import (
    BITS,
    GROUP_SIZE,
    PackedExport,
    PlannedExport,
)
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.groups import (
    BiasGroups,
    convert_to_bias_groups,
    pack_code_words,
    quantize_bias_groups,
)
from dist_peft.export.formats.mlx_config import find_mlx_obstacle, make_mlx_keys
from dist_peft.export.formats.mlx_experts import (
    MlxExperts,
    has_alternating_rows,
    name_in_stack,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify_formats import ProcessConsumer, TransformersConsumer
from dist_peft.model.experts import ExpertStack
from dist_peft.model.hub import read_json_object
from dist_peft.quant.affine import AffineCodec
from dist_peft.store.writer import TensorSpec

__all__ = [
    "FloatBiasPacker",
    "HfMetalExport",
    "HfMetalPacker",
    "MlxExport",
    "MlxPacker",
    "find_stored_group_size",
]

MLX_GROUPS = (128, 64, 32)
_BOTH = ("gate_proj", "up_proj")


def find_stored_group_size(group_size: int, allowed: tuple[int, ...]) -> int:
    """Return the largest allowed group size that divides ``group_size``, or 0 if there is none."""
    return next((g for g in sorted(allowed, reverse=True) if group_size % g == 0), 0)


class FloatBiasPacker:
    """Pack linears as codes with scales and float biases; base class of ``MlxPacker`` and
    ``HfMetalPacker``.

    Args:
        bits: bits of a stored code.
        group_size: columns that share a stored scale and bias.
        dtype: type of stored scales and biases.
    """

    row_multiple = 1
    bias_name: str

    def __init__(self, bits: int, group_size: int, dtype: torch.dtype) -> None:
        self.bits, self.group_size, self.dtype = bits, group_size, dtype

    def can_pack(self, weight: BaseWeight) -> bool:
        return weight.num_columns % self.group_size == 0 and weight.num_columns % 32 == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        groups = (weight.num_rows, weight.num_columns // self.group_size)
        words = (weight.num_rows, weight.num_columns * self.bits // 32)
        return [
            TensorSpec(weight.written, torch.uint32, words),
            TensorSpec(f"{weight.name_stem}.scales", self.dtype, groups),
            TensorSpec(f"{weight.name_stem}.{self.bias_name}", self.dtype, groups),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        groups = self._make_groups(walk, weight, span)
        yield TensorPiece(
            weight.written, pack_code_words(groups.codes, self.bits, torch.uint32), span.start
        )
        yield TensorPiece(f"{weight.name_stem}.scales", groups.scale, span.start)
        yield TensorPiece(f"{weight.name_stem}.{self.bias_name}", groups.bias, span.start)

    def _make_groups(self, walk: MergedWeights, weight: BaseWeight, span: Span) -> BiasGroups:
        if walk.state in ("codes", "trained"):
            parts = walk.read_affine_parts(weight, span)
            return convert_to_bias_groups(parts, weight.num_columns, self.group_size, self.dtype)
        rows = walk.read_merged_rows(weight, span)
        return quantize_bias_groups(rows, self.bits, self.group_size, self.dtype)


class MlxPacker(FloatBiasPacker):
    """Pack linears for MLX's affine mode, in groups of 32, 64 or 128.

    Args:
        described: the base's ``config.json``.

    Raises:
        UserError: no group size of MLX divides ``group_size``.
    """

    bias_name = "biases"
    row_multiple = 2  # rows of experts may be of two projections in turn

    def __init__(
        self,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        described: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._has_text_config = "text_config" in described
        text = described.get("text_config", described)
        self.kind = str(text.get("model_type", ""))
        stored = find_stored_group_size(group_size, MLX_GROUPS)
        if not stored:
            raise UserError(
                f"mlx supports groups of 32, 64 and 128, not of {group_size}; export this run as "
                "hf-metal, or merge it (hf-bf16)"
            )
        super().__init__(bits, stored, dtype)

    def can_pack(self, weight: BaseWeight) -> bool:
        # mlx-lm makes two products of kv_b_proj, and would round each again
        is_latent = weight.module_path.endswith(".kv_b_proj")
        return super().can_pack(weight) and not is_latent

    def rewrites(self, weight: BaseWeight) -> bool:
        """Return whether the tensor, no linear's, has another form: biases of experts that have
        numbers of two projections in turn."""
        return weight.path.endswith("_bias") and has_alternating_rows(weight, self.kind)

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        """Of the first expert, the tensors of all of them; of the others none."""
        if self.rewrites(weight):
            experts, both = weight.info.shape
            names = (name_in_stack(weight, own, self.kind) for own in _BOTH)
            return [TensorSpec(f"{n}.bias", self.dtype, (experts, both // 2)) for n in names]
        specs = super().plan_tensors(weight)
        if not weight.is_expert:
            return specs
        assert isinstance(weight.linear, ExpertStack)
        if weight.first >= weight.linear.out_features:
            return []
        count, projections = weight.linear.experts, self._list_projections(weight)
        return [
            TensorSpec(
                self._name_tensor(weight, own, spec.name),
                spec.dtype,
                (count, spec.shape[0] // len(projections), *spec.shape[1:]),
            )
            for own in projections
            for spec in specs
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        if self.rewrites(weight):
            rows = walk.read_merged_rows(weight, span)
            for i, own in enumerate(_BOTH):
                name = f"{name_in_stack(weight, own, self.kind)}.bias"
                yield TensorPiece(name, rows[:, i::2].to(self.dtype), span.start)
            return
        for piece in super().pack_rows(walk, weight, span):
            if not weight.is_expert:
                yield piece
                continue
            projections = self._list_projections(weight)
            count = len(projections)
            expert, _ = weight.find_expert()
            first = (expert * weight.num_rows + piece.start) // count
            for i, own in enumerate(projections):
                name = self._name_tensor(weight, own, piece.name)
                yield TensorPiece(name, piece.rows[i::count].contiguous(), first)

    def _list_projections(self, weight: BaseWeight) -> tuple[str, ...]:
        """Return the projections whose rows an expert's tensor has, in turn."""
        return _BOTH if has_alternating_rows(weight, self.kind) else (weight.find_expert()[1],)

    def _name_tensor(self, weight: BaseWeight, projection: str, name: str) -> str:
        own = name.rpartition(".")[2]
        own = own if own in ("scales", "biases") else "weight"
        return f"{name_in_stack(weight, projection, self.kind)}.{own}"

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        how = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        skeleton = walk.skeleton
        keys = make_mlx_keys(skeleton.model_config.get_text_config(), tied=skeleton.tied)
        if self._has_text_config:
            keys = {
                "vocab_size": keys["vocab_size"],
                "tie_word_embeddings": skeleton.tied,
                "text_config": keys,
            }
        return {"quantization": how, **keys}


class HfMetalPacker(FloatBiasPacker):
    """Pack linears for ``transformers``' ``quant_method: metal``; 3-bit codes take 4 bits."""

    bias_name = "qbiases"

    def __init__(self, bits: int, group_size: int, dtype: torch.dtype) -> None:
        super().__init__(4 if bits == 3 else bits, group_size, dtype)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        return {
            "quantization_config": {
                "quant_method": "metal",
                "bits": self.bits,
                "group_size": self.group_size,
                "modules_to_not_convert": list_unpacked_linears(walk, unpacked),
            }
        }


class _FloatBiasExport(PackedExport):
    """Codes of a QA-LoRA run with the adapter in the biases; of other runs merged rows."""

    options = (BITS, GROUP_SIZE)

    @abstractmethod
    def make_packer(
        self, job: ExportSpec, codec: AffineCodec, dtype: torch.dtype
    ) -> MlxPacker | HfMetalPacker:
        """Return the packer of the format for codes as ``codec`` has them."""

    def write_export(self, job: ExportSpec) -> ExportResult:
        # float32 scales require float32 elsewhere: transformers would fail on mixed types
        kept = job.codes_state
        codec, dtype = job.make_target_codec(64), torch.float32 if kept else job.compute_dtype
        packer = self.make_packer(job, codec, dtype)
        done = {
            "codes": "codes kept, adapter in the biases",
            "trained": "the trained codes",
        }.get(kept or "", "merged, rounded to nearest")
        how = f"{done}: {packer.bits} bits in groups of {packer.group_size}"
        return self.write_directory(
            job, kept or job.merge_state, packer, how, dtype=dtype, exact=kept is not None
        )


def run_mlx(model: Path, ids: list[int]) -> tuple[str, Any]:
    """Runs in the environment of mlx-lm (``export.verify_consumer``)."""
    from importlib.metadata import version

    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    loaded = load_model(model)[0]
    logits = loaded(mx.array([ids])).astype(mx.float32)
    return f"mlx-lm {version('mlx-lm')}", np.array(logits)[0]


class MlxExport(_FloatBiasExport):
    """MLX's affine mode."""

    name = "mlx"
    keeps = "QA-LoRA: codes, scales, float32 biases. LoRA: merged, 2/3/4/8 bits"
    loads_with = "mlx-lm"
    classifier_limit = "mlx-lm has no classifiers"
    experts = MlxExperts()
    consumer = ProcessConsumer(
        "mlx", run_mlx, "mlx_lm", "DIST_PEFT_MLX_PYTHON", "pip install 'mlx[cpu]' mlx-lm"
    )

    def make_packer(
        self, job: ExportSpec, codec: AffineCodec, dtype: torch.dtype
    ) -> MlxPacker | HfMetalPacker:
        described = read_json_object(job.directory / "config.json")
        return MlxPacker(codec.bits, codec.group_size, dtype, described)

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        described = read_json_object(run.directory / "config.json")
        kind = str(described.get("model_type", ""))
        if reason := find_mlx_obstacle(run.skeleton.model_config, kind):
            return reason
        rows = run.codec.affine_rows
        if rows is None or not run.limits.fits_zero_points:
            return None
        if not find_stored_group_size(rows.group_size, MLX_GROUPS):
            return f"mlx does not support groups of {rows.group_size}"
        return None


class HfMetalExport(_FloatBiasExport):
    """``quant_method: metal`` of ``transformers``."""

    name = "hf-metal"
    keeps = "QA-LoRA: codes, scales, float32 biases. LoRA: merged, 2/4/8 bits"
    loads_with = "transformers, CPU or Apple GPU"
    experts = ExpertLayout(dense_stacks=True)
    consumer = TransformersConsumer(
        needs=("accelerate",),
        # its default device is an Apple GPU; linears take the type of their scales, which all
        # else must match
        settings={"device_map": "cpu", "dtype": "auto"},
    )

    def make_packer(
        self, job: ExportSpec, codec: AffineCodec, dtype: torch.dtype
    ) -> MlxPacker | HfMetalPacker:
        return HfMetalPacker(codec.bits, codec.group_size, dtype)
