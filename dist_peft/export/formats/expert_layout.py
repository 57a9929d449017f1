"""The form of a mixture's experts in a packed export: packed, dense, or none that a reader loads.

Readers of packed formats know the weights of experts by the names of published files, a tensor for
each expert and projection; a base that has them stacked is written under these names.
``transformers`` stacks them while it loads (compressed-tensors, metal), as mlx-lm does; gptqmodel
makes each expert three linears under names of its own; bitsandbytes replaces linears, and
``transformers`` has no linears for experts: they stay dense.
"""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.export.base_weights import name_by_modules, split_stacks
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import WeightPacker
from dist_peft.model.expert_names import list_expert_names
from dist_peft.model.experts import ExpertStack

__all__ = ["ExpertLayout"]

log = logging.getLogger("dist_peft")

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
        by_modules: all tensors have the names of ``base_weights.name_by_modules``.
        codes_limit: why the codes of training cannot be kept, but for those of a base that comes
            without zero points; empty: they can.
        separate_limit: why the adapter cannot be apart from the base; empty: it can.
    """

    packed: bool = True
    stacked: bool = False
    by_modules: bool = False
    codes_limit: str = ""
    separate_limit: str = ""

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
        if self.packed and not self.stacked and not _can_be_separate(model):
            return _STACKED
        if separate and self.separate_limit:
            return self.separate_limit
        is_kept = codes and not separate and all(map(_has_middle_zeros, stacks))
        return self.codes_limit or None if (codes or separate) and not is_kept else None

    def prepare_weights(self, walk: MergedWeights, packer: WeightPacker) -> None:
        """Name the weights of a mixture before they are written.

        Raises:
            UserError: the experts have no such form, or only some of them can be packed.
        """
        experts = [weight for weight in walk.weights if weight.is_expert]
        if not experts:
            return
        state = walk.state
        codes, separate = state in ("codes", "trained"), state == "base"
        if reason := self.find_obstacle(walk.skeleton.model, codes=codes, separate=separate):
            raise UserError(f"{walk.skeleton.index.path} is a mixture of experts: {reason}")
        if not self.packed:
            log.warning(
                "experts are written unquantized, as the readers of this format have no packed "
                "ones; mlx and gguf pack them",
                extra=ONCE,
            )
        if self.packed and not self.stacked:
            walk.weights = split_stacks(walk.weights, walk.skeleton)
            experts = [weight for weight in walk.weights if weight.is_expert]
        for weight in experts if self.packed else ():
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
