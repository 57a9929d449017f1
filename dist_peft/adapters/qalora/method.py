"""The adapter method ``qalora``: QA-LoRA on an integer base (``adapters.qalora`` has the layer)."""

from collections.abc import Mapping

from torch import Tensor, nn

from dist_peft.adapters.low_rank.method import LowRankAdapter
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.low_rank.pooling import Pooling
from dist_peft.adapters.protocol import ExportLimits, PublicAdapter
from dist_peft.adapters.qalora.format import to_public_qalora
from dist_peft.adapters.qalora.layer import QaLoraLinear
from dist_peft.core.config.run import QaLoraConfig
from dist_peft.core.errors import UserError
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["QaLoraAdapter"]


class QaLoraAdapter(LowRankAdapter[QaLoraConfig, QaLoraLinear]):
    """QA-LoRA on the linears of an integer base."""

    def attach_to_model(self, model: nn.Module) -> None:
        """Wrap the targets.

        Raises:
            UserError: also where the base has no integer groups, or pool groups are no unions of
                them.
        """
        misfits = [
            f"{name} ({module.in_features})"
            for name in self._list_target_names(model)
            if isinstance(module := model.get_submodule(name), FrozenLinear)
            and module.in_features % self._resolve_pool_size(name, module)
        ]
        if misfits:
            raise self._build_misfit_error(misfits)
        super().attach_to_model(model)

    def _build_layer(self, name: str, module: nn.Module) -> QaLoraLinear:
        linear = self._require_linear(name, module)
        r, alpha = self._resolve_rank_and_alpha(name)
        spec = LowRankSpec(r, alpha / r, self.arithmetic, self.seed)
        pool_size = self._resolve_pool_size(name, linear)
        return QaLoraLinear(linear, name, spec, pool_size, self._build_dropout(name))

    def _resolve_pool_size(self, name: str, module: FrozenLinear) -> int:
        """The size of pool groups, which must be unions of the base's groups."""
        rows = module.codec.affine_rows
        if module.is_head and rows is not None:
            raise UserError(
                f"adapter.kind qalora merges into the zeros of the blocks' linears, and {name} is "
                "the output head, which formats keep dense; leave it out of adapter.target_modules"
            )
        if rows is None:
            raise UserError(
                f"adapter.kind qalora merges into the zeros of an integer base, but {name} is "
                f"stored as {module.codec.name}, which has none; "
                + (
                    "set base.quant.kind to int"
                    if module.stored is None
                    else "give an integer base"
                )
                + f" or leave {'the output head' if module.is_head else 'it'} out of "
                "adapter.target_modules, or adapter.kind to lora"
            )
        size = self.config.pool_size or rows.group_size
        if size % rows.group_size:
            raise UserError(
                f"adapter.pool_size {size} is no multiple of base.quant.group_size "
                f"{rows.group_size}: a group of the base would lie in two pool groups and its one "
                "zero could not hold both changes; leave adapter.pool_size out to pool by the "
                "base's groups"
            )
        return size

    def _build_misfit_error(self, misfits: list[str]) -> UserError:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        key = "adapter.pool_size" if self.config.pool_size else "base.quant.group_size"
        return UserError(
            "adapter.kind qalora pools whole groups, but the in_features of "
            f"{', '.join(misfits[:3])}{more} are not divisible by {key}; choose a size that "
            "divides them, or leave these modules out of adapter.target_modules"
        )

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return ExportLimits(fits_zero_points=True)

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """Our form, with the sum convention (``adapters.qalora.format``)."""
        sizes = {layer.pool_size for layer in self.layers.values()}
        assert len(sizes) == 1, sizes
        pooling = Pooling(sizes.pop(), "sum")
        return to_public_qalora(
            self.config, pooling, self._collect_gathered(tensors), self._list_adapted_names(), base
        )
