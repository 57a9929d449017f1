"""The adapter method ``lokr`` (``adapters.lokr.layer`` has the layer)."""

from collections.abc import Mapping

from torch import Tensor, nn

from dist_peft.adapters.lokr.format import build_public_lokr
from dist_peft.adapters.lokr.layer import LokrLinear, LokrSpec
from dist_peft.adapters.low_rank.method import LowRankAdapter
from dist_peft.adapters.protocol import ExportLimits, PublicAdapter
from dist_peft.core.config.run import LokrConfig
from dist_peft.core.errors import UserError

__all__ = ["LokrAdapter"]


class LokrAdapter(LowRankAdapter[LokrConfig, LokrLinear]):
    """LoKr on linears."""

    def _build_layer(self, name: str, module: nn.Module) -> LokrLinear:
        linear = self._require_linear(name, module)
        r, alpha = self._resolve_rank_and_alpha(name)
        config = self.config
        spec = LokrSpec(
            r=r,
            scaling=alpha / r,
            arithmetic=self.arithmetic,
            seed=self.seed,
            factor=config.decompose_factor,
            both=config.decompose_both,
        )
        layer = LokrLinear(linear, name, spec, self._build_dropout(name))
        l, _, m, _ = layer.sides  # noqa: E741
        if l == m == 1:
            factor = config.decompose_factor
            why = "have" if factor is None else f"have, up to adapter.decompose_factor {factor},"
            raise UserError(
                f"adapter.kind lokr cannot factor {name}: its {linear.out_features} outputs and "
                f"{linear.in_features} inputs {why} no divisor but 1; "
                + ("" if factor is None else "choose another adapter.decompose_factor, or ")
                + "leave it out of adapter.target_modules"
            )
        return layer

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return ExportLimits(
            gptq_linears="PEFT does not support LoKr on GPTQ linears (or --merge --lossy)",
            bnb_linears="PEFT does not support LoKr on linears of bitsandbytes",
        )

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``adapters.lokr.format``."""
        modules = self._collect_gathered(tensors)
        return build_public_lokr(self.config, modules, self._list_adapted_names(), base)
