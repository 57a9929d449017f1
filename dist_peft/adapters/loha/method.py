"""The adapter method ``loha`` (``adapters.loha.layer`` has the layer)."""

from collections.abc import Mapping

from torch import Tensor, nn

from dist_peft.adapters.loha.format import build_public_loha
from dist_peft.adapters.loha.layer import LohaLinear
from dist_peft.adapters.low_rank.method import LowRankAdapter
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.protocol import ExportLimits, PublicAdapter
from dist_peft.core.config.run import LohaConfig
from dist_peft.core.errors import UserError

__all__ = ["LohaAdapter"]


class LohaAdapter(LowRankAdapter[LohaConfig, LohaLinear]):
    """LoHa on linears."""

    def _build_layer(self, name: str, module: nn.Module) -> LohaLinear:
        linear = self._require_linear(name, module)
        r, alpha = self._resolve_rank_and_alpha(name)
        most = min(linear.in_features, linear.out_features)
        if r > most:
            raise UserError(
                f"adapter.kind loha needs a rank of at most {most} in {name} "
                f"[{linear.out_features}, {linear.in_features}], not {r}: its products have no "
                "higher one; lower adapter.r or adapter.rank_pattern"
            )
        spec = LowRankSpec(r, alpha / r, self.arithmetic, self.seed)
        return LohaLinear(linear, name, spec, self._build_dropout(name))

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return ExportLimits(
            gptq_linears="PEFT does not support LoHa on GPTQ linears (or --merge --lossy)",
            bnb_linears="PEFT does not support LoHa on linears of bitsandbytes",
        )

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``adapters.loha.format``."""
        modules = self._collect_gathered(tensors)
        return build_public_loha(self.config, modules, self._list_adapted_names(), base)
