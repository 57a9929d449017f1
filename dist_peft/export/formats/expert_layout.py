"""The form of a mixture's experts in a packed export: packed, dense, or none that a reader loads.

Readers of packed formats know the weights of experts in one of these forms:

    single     by the names of published files, a tensor for each expert and projection; a base that
               has them stacked is written under these names. ``transformers`` stacks them while it
               loads (compressed-tensors, metal), as mlx-lm does; gptqmodel makes each expert three
               linears under names of its own
    stacked    a packed tensor of all experts (gpt-oss in MXFP4)
    linears    Llama 4's, for which ``transformers`` builds a linear for each expert and projection
               where bitsandbytes or compressed-tensors pack them
    dense      not packed, next to packed linears: bitsandbytes replaces linears, and
               ``transformers`` has none for other families' experts; and where the files have them
               stacked and ``transformers`` has no names of single experts (gpt-oss, Granite, Aria,
               Qwen3-VL-MoE), metal, fp8 and compressed-tensors read no packed stack
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.export.base_weights import (
    BaseWeight,
    name_as_linears,
    name_as_published,
    name_by_modules,
    split_stacks,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import WeightPacker
from dist_peft.model.expert_names import list_expert_names
from dist_peft.model.experts import ExpertStack

__all__ = ["LLAMA4_LINEARS", "ExpertForm", "ExpertLayout"]

log = logging.getLogger("dist_peft")

ExpertForm = Literal["single", "stacked", "linears", "dense"]

LLAMA4_LINEARS = frozenset({"llama4_text"})
"""Types whose experts ``transformers`` makes linears for bitsandbytes and compressed-tensors."""

_STACKED = (
    "the base's files have the experts stacked, and transformers has no names of single experts "
    "for this model, which readers of this format want"
)


@dataclass(frozen=True)
class ExpertLayout:
    """The form of experts in one format.

    Attributes:
        packed: they are packed as linears are; if not, they are written in the run's compute type.
        stacked: a tensor of all experts is packed, too.
        linear_types: types of text models whose experts the reader makes linears of their own.
        dense_stacks: experts without names of single ones are written in the run's compute type.
        by_modules: all tensors have the names of ``base_weights.name_by_modules``.
        codes_limit: why the codes of training cannot be kept, but for those of a base that comes
            without zero points; empty: they can.
        separate_limit: why the adapter cannot be apart from the base; empty: it can.
    """

    packed: bool = True
    stacked: bool = False
    linear_types: frozenset[str] = frozenset()
    dense_stacks: bool = False
    by_modules: bool = False
    codes_limit: str = ""
    separate_limit: str = ""

    def choose_form(self, model: Any) -> ExpertForm | None:
        """Return the form of the experts of ``model``, a mixture; None: they have none."""
        if model.config.get_text_config().model_type in self.linear_types:
            return "linears"
        if not self.packed:
            return "dense"
        if self.stacked:
            return "stacked"
        if _can_be_separate(model):
            return "single"
        return "dense" if self.dense_stacks else None

    def find_obstacle(
        self, model: nn.Module, *, codes: bool = False, separate: bool = False
    ) -> str | None:
        """Return why the experts of ``model`` have no such form; None: they have, or there are
        none.

        Args:
            codes: the codes of training are kept.
            separate: the adapter is written apart from the base.
        """
        stacks = [module for module in model.modules() if isinstance(module, ExpertStack)]
        if not stacks:
            return None
        form = self.choose_form(model)
        if form is None:
            return _STACKED
        if form == "stacked" and (limit := next((s.limit for s in stacks if s.limit), "")):
            return limit
        if separate and self.separate_limit:
            return self.separate_limit
        is_kept = codes and not separate and all(map(_has_middle_zeros, stacks))
        return self.codes_limit or None if (codes or separate) and not is_kept else None

    def prepare_weights(
        self, walk: MergedWeights, packer: WeightPacker, dtype: torch.dtype
    ) -> None:
        """Name the weights of a mixture before they are written.

        Args:
            dtype: type of experts that stay dense.

        Raises:
            UserError: the experts have no such form, or only some of them can be packed.
        """
        if not any(weight.is_expert for weight in walk.weights):
            return
        state, model = walk.state, walk.skeleton.model
        codes, separate = state in ("codes", "trained"), state == "base"
        if reason := self.find_obstacle(model, codes=codes, separate=separate):
            raise UserError(f"{walk.skeleton.index.path} is a mixture of experts: {reason}")
        form = self.choose_form(model)
        if form == "dense":
            walk.weights = [replace(weight, is_dense=weight.is_expert) for weight in walk.weights]
            _warn_of_dense_experts(walk.weights, dtype)
            return
        if form != "stacked":
            names = name_as_linears if form == "linears" else name_as_published
            walk.weights = split_stacks(walk.weights, walk.skeleton, names)
        for weight in (weight for weight in walk.weights if weight.is_expert):
            if not (walk.is_packable(weight) and packer.can_pack(weight)):
                raise UserError(
                    f"{weight.name} is an expert's with in_features {weight.num_columns}, which "
                    "groups or words of this format do not divide, and readers want all experts "
                    "packed; choose a smaller --group-size, or another format"
                )
        if self.by_modules:
            walk.weights = name_by_modules(walk.weights)


def _can_be_separate(model: Any) -> bool:
    """Return whether each expert is a tensor in the files, or has the name of one."""
    return all(
        (len(stack.pieces) >= stack.experts and not stack.limit)
        or list_expert_names(model, path, stack.experts, stack.out_features) is not None
        for path, stack in model.named_modules()
        if isinstance(stack, ExpertStack)
    )


def _has_middle_zeros(stack: ExpertStack) -> bool:
    """Return whether a stack comes packed in integers without zero points."""
    return stack.stored is not None and stack.stored.has_middle_zeros


def _warn_of_dense_experts(weights: list[BaseWeight], dtype: torch.dtype) -> None:
    """Log the bytes of experts that are not packed, and those of all weights before packing."""
    sizes = [(w.is_dense, torch.Size(w.info.shape).numel() * dtype.itemsize) for w in weights]
    dense, whole = sum(size for is_dense, size in sizes if is_dense), sum(s for _, s in sizes)
    log.warning(
        "experts stay unquantized, %.1f of %.1f MiB of weights in %s: readers of "
        "this format have no packed ones of this model",
        dense / 2**20,
        whole / 2**20,
        str(dtype).removeprefix("torch."),
        extra=ONCE,
    )
