"""Names and experts as mlx-lm has them.

mlx-lm has all experts of a projection in one tensor ``[experts, out, ...]``, ``gate_proj`` and
``up_proj`` apart::

    most families        OWNER.switch_mlp.gate_proj     such as model.layers.0.mlp.switch_mlp
    gpt-oss, Llama 4     OWNER.experts.gate_proj

Files have a tensor for each expert, or stacks with the rows of both projections: halves, or in
turn (gpt-oss). A few families have other names of norms and mixtures than their files.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.export.base_weights import BaseWeight, split_experts
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.mlx_config import find_mlx_obstacle
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import WeightPacker
from dist_peft.model.hub import read_json_object

__all__ = ["MlxExperts", "has_alternating_rows", "name_in_stack"]

_STACKED = ("gpt_oss", "llama4_text", "granitemoe", "qwen3_vl_moe_text")
"""Types of text models whose files have stacks without names of single experts, and that mlx-lm
has."""

_OWN_EXPERTS = ("gpt_oss", "llama4_text")
_ALTERNATING = ("gpt_oss",)

_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_oss": ((r"\.down_proj_bias$", ".down_proj.bias"),),
    "kimi_linear": (
        (r"\.block_sparse_moe\.gate\.e_score", ".mlp.e_score"),
        (r"\.block_sparse_moe\.", ".mlp."),
    ),
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
}
"""Type of the text model -> parts of names in the files, and mlx-lm's."""


def has_alternating_rows(weight: BaseWeight, kind: str) -> bool:
    """Return whether the tensor of experts has rows of two projections in turn; ``kind``: the
    text model's type."""
    return kind in _ALTERNATING and weight.path.rpartition(".experts.")[2].startswith("gate_up")


def name_in_stack(weight: BaseWeight, projection: str, kind: str) -> str:
    """Return mlx-lm's name of a projection of all experts, without ``.weight``."""
    owner, found, _ = weight.written.rpartition(".experts.")
    if not found:  # granitemoe: NAME.input_linear
        owner = re.sub(r"\.(in|out)put_linear\..*$", "", weight.written)
    return f"{owner}.{'experts' if kind in _OWN_EXPERTS else 'switch_mlp'}.{projection}"


@dataclass(frozen=True)
class MlxExperts(ExpertLayout):
    """The form of experts in mlx-lm's files."""

    def find_obstacle(
        self, model: nn.Module, *, codes: bool = False, separate: bool = False
    ) -> str | None:
        config: Any = model.config
        if config.get_text_config().model_type in _STACKED:
            return None
        return super().find_obstacle(model, codes=codes, separate=separate)

    def prepare_weights(
        self, walk: MergedWeights, packer: WeightPacker, dtype: torch.dtype
    ) -> None:
        config = walk.skeleton.model_config
        kind = config.get_text_config().model_type
        directory = walk.skeleton.index.path
        described = read_json_object(directory / "config.json")
        if reason := find_mlx_obstacle(config, str(described.get("model_type", kind))):
            raise UserError(f"{directory} is not written as mlx: {reason}")
        if kind in _STACKED:
            walk.weights = split_experts(walk.weights, halves=kind not in _ALTERNATING)
            ExpertLayout(stacked=True).prepare_weights(walk, packer, dtype)
        else:
            super().prepare_weights(walk, packer, dtype)
        walk.weights = list(_rename(walk.weights, kind))


def _rename(weights: Iterable[BaseWeight], kind: str) -> Iterable[BaseWeight]:
    for weight in weights:
        written = weight.written
        for pattern, name in _NAMES.get(kind, ()):
            written = re.sub(pattern, name, written)
        yield replace(weight, written=written)
