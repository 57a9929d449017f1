"""The adapter method ``vera``: vectors on shared random projections (``adapters.vera.layer``)."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_peft.adapters.low_rank.method import LinearsAdapter
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.peft_tensors import mark_transposed
from dist_peft.adapters.protocol import ExportLimits, PublicAdapter
from dist_peft.adapters.vera.format import build_public_vera
from dist_peft.adapters.vera.layer import VeraLinear
from dist_peft.adapters.vera.projections import SharedProjections, draw_projections
from dist_peft.core.config.run import VeraConfig

__all__ = ["VeraAdapter"]


class VeraAdapter(LinearsAdapter[VeraConfig, VeraLinear]):
    """VeRA on linears."""

    takes_transposed = True

    def _prepare_targets(self, names: Sequence[str], model: nn.Module) -> None:
        linears = [self._require_linear(name, model.get_submodule(name)) for name in names]
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        config = self.config
        pair = draw_projections(config.r, shapes, config.projection_seed)
        self._projections = SharedProjections(*pair)

    def _build_layer(self, name: str, module: nn.Module) -> VeraLinear:
        config = self.config
        return VeraLinear(
            self._require_linear(name, module),
            name,
            LowRankSpec(config.r, 1.0, self.arithmetic, self.seed),
            self._build_dropout(name),
            self._projections,
            config.d_initial,
        )

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return ExportLimits(
            gptq_linears="PEFT does not support VeRA on GPTQ linears (or --merge --lossy)"
        )

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``adapters.vera.format``."""
        config, pair = self.config, self._projections
        public = build_public_vera(
            config,
            self._collect_gathered(tensors),
            (pair.A.cpu(), pair.B.cpu()) if config.save_projection else None,
            self._list_adapted_names(),
            base,
        )
        return mark_transposed(public, self.layers.values())
