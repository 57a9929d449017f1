"""LoKr on disk, in the format of Hugging Face PEFT.

::

    adapter_config.json         PEFT's LoKrConfig
    adapter_model.safetensors   base_model.model.PATH.lokr_w1 [l, m], or .lokr_w1_a [l, r] and
                                .lokr_w1_b [r, m]; .lokr_w2 [k, n], or .lokr_w2_a and .lokr_w2_b

For dropout see ``adapters.loha.format``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.adapters.low_rank.delta_format import DeltaFormat
from dist_peft.adapters.low_rank.delta_merger import WeightDelta
from dist_peft.adapters.peft_tensors import (
    build_linears_config,
    build_rank_config,
    check_tensor_shape,
    iterate_ranked_modules,
    name_module_tensors,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import LokrConfig
from dist_peft.core.span import Span

__all__ = ["LokrDelta", "LokrFormat", "build_public_lokr", "parse_lokr_tensors"]

_NAMES = tuple(f"lokr_w{number}{part}" for number in (1, 2) for part in ("", "_a", "_b"))


class LokrFormat(DeltaFormat):
    """LoKr in PEFT's files: two to four matrices a module."""

    peft_types = ("LOKR",)
    method_name = "LoKr"
    on_gptq_linears = False
    on_bnb_linears = False

    def parse_deltas(self, public: PublicAdapter) -> Mapping[str, WeightDelta]:
        """Return module path -> its change. See ``parse_lokr_tensors``."""
        return parse_lokr_tensors(public)


@dataclass(frozen=True)
class LokrDelta:
    """``scaling W1 (x) W2``: ``W1`` [l, m], ``W2`` [k, n]."""

    w1: Tensor
    w2: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def add_to_rows(self, rows: Tensor, span: Span) -> Tensor:
        """Return ``rows`` with rows ``span`` of the change added, float32.

        Each element of the change is a product of two numbers.
        """
        numbers = torch.arange(span.start, span.stop)
        left = self.w1[numbers // self.w2.shape[0]].to(rows.device)
        right = self.w2[numbers % self.w2.shape[0]].to(rows.device)
        change = (left[:, :, None] * right[:, None]).flatten(1)
        return rows.float().add(change, alpha=self.scaling)


def parse_lokr_tensors(public: PublicAdapter) -> dict[str, LokrDelta]:
    """Return module path -> its change, with every shape checked.

    Raises:
        UserError: a tensor is empty, absent, of another method or shape.
    """
    found = {}
    for path, own, r, scaling in iterate_ranked_modules(public, _NAMES, "LoKr"):
        w1, w2 = (_read_matrix(path, own, f"lokr_w{number}", r) for number in (1, 2))
        found[path] = LokrDelta(w1, w2, scaling)
    return found


def _read_matrix(path: str, own: Mapping[str, Tensor], name: str, r: int) -> Tensor:
    if name in own or f"{name}_a" not in own:
        return check_tensor_shape(path, own, name, (None, None))
    a = check_tensor_shape(path, own, f"{name}_a", (None, r))
    return a @ check_tensor_shape(path, own, f"{name}_b", (r, None))


def build_public_lokr(
    config: LokrConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    target_names: Sequence[str],
    base: str,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        modules: module path -> own parameter name -> whole tensor.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
    """
    public = {
        **build_linears_config("LOKR", target_names, base),
        **build_rank_config(config),
        "rank_dropout_scale": False,
        "use_effective_conv2d": False,
        "decompose_both": config.decompose_both,
        "decompose_factor": config.decompose_factor or -1,
    }
    return PublicAdapter(public, name_module_tensors(modules))
