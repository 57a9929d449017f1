"""LoHa on disk, in the format of Hugging Face PEFT.

::

    adapter_config.json         PEFT's LoHaConfig
    adapter_model.safetensors   base_model.model.PATH.hada_w1_a, .hada_w2_a [out, r]
                                base_model.model.PATH.hada_w1_b, .hada_w2_b [r, in]

PEFT's ``rank_dropout`` drops outputs, its ``module_dropout`` whole modules; the dropout that is
trained with here is on the input, of which its configuration has none. All act in training only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.adapters.low_rank.delta_format import DeltaFormat
from dist_peft.adapters.low_rank.delta_merger import ProductDelta, WeightDelta
from dist_peft.adapters.peft_tensors import (
    build_linears_config,
    build_rank_config,
    check_tensor_shape,
    iterate_ranked_modules,
    name_module_tensors,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import LohaConfig
from dist_peft.core.span import Span

__all__ = ["LohaDelta", "LohaFormat", "build_public_loha", "parse_loha_tensors"]

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LohaFormat(DeltaFormat):
    """LoHa in PEFT's files: four matrices a module."""

    peft_types = ("LOHA",)
    method_name = "LoHa"
    on_gptq_linears = False
    on_bnb_linears = False

    def parse_deltas(self, public: PublicAdapter) -> Mapping[str, WeightDelta]:
        """Return module path -> its change. See ``parse_loha_tensors``."""
        return parse_loha_tensors(public)


@dataclass(frozen=True)
class LohaDelta:
    """``scaling`` times the elementwise product of two low-rank products."""

    first: ProductDelta
    second: ProductDelta
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.first.shape

    def add_to_rows(self, rows: Tensor, span: Span) -> Tensor:
        """Return ``rows`` with rows ``span`` of the change added, float32."""
        zeros = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        change = self.first.add_to_rows(zeros, span)
        change *= self.second.add_to_rows(zeros, span)
        return rows.float().add(change, alpha=self.scaling)


def parse_loha_tensors(public: PublicAdapter) -> dict[str, LohaDelta]:
    """Return module path -> its change, with every shape checked.

    Raises:
        UserError: a tensor is empty, absent, of another method or shape.
    """
    found = {}
    for path, own, r, scaling in iterate_ranked_modules(public, _NAMES, "LoHa"):
        a = check_tensor_shape(path, own, "hada_w1_a", (None, r))
        b = check_tensor_shape(path, own, "hada_w1_b", (r, None))
        second = ProductDelta(
            check_tensor_shape(path, own, "hada_w2_a", (a.shape[0], r)),
            check_tensor_shape(path, own, "hada_w2_b", (r, b.shape[1])),
        )
        found[path] = LohaDelta(ProductDelta(a, b), second, scaling)
    return found


def build_public_loha(
    config: LohaConfig,
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
        **build_linears_config("LOHA", target_names, base),
        **build_rank_config(config),
        "use_effective_conv2d": False,
    }
    return PublicAdapter(public, name_module_tensors(modules))
