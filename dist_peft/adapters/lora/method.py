"""The adapter method ``lora``: LoRA, rsLoRA, DoRA, LoRA+ and its initializations on any base.

LoRA+ (Hayou, Ghosh, Yu 2024): ``B`` has ``lr_ratio`` times the learning rate of ``A``; magnitudes
and embeddings have the plain rate. rsLoRA (Kalajdzievski 2023): ``s = alpha / sqrt(r)``.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from dist_peft.adapters.lora.embedding import LoraEmbedding
from dist_peft.adapters.lora.expert_format import (
    is_taken_for_experts,
    list_target_parameters,
    to_public_expert_path,
)
from dist_peft.adapters.lora.expert_layer import LoraExperts
from dist_peft.adapters.lora.format import build_public_lora, drop_unused_ranks
from dist_peft.adapters.lora.initialization import RESIDUAL_INITS
from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.adapters.lora.siblings import link_siblings
from dist_peft.adapters.lora.through_experts import ThroughExperts
from dist_peft.adapters.lora.through_quantizer import (
    ThroughLinear,
    require_codec,
    require_trainable_zeros,
    resolve_start,
    update_rows,
)
from dist_peft.adapters.lora.through_rows import ThroughRows
from dist_peft.adapters.low_rank.method import LowRankAdapter
from dist_peft.adapters.peft_tensors import mark_transposed
from dist_peft.adapters.protocol import ExportLimits, PublicAdapter
from dist_peft.adapters.step_hooks import ParameterAccess
from dist_peft.core.config.run import LoraConfig
from dist_peft.core.errors import UserError
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout

__all__ = ["LoraAdapter"]

log = logging.getLogger("dist_peft")

_MASKED_APART = (
    "with adapter.keep_zeros the change is cut off where the base is zero, and PEFT would apply "
    "the whole of it; merge the run"
)


class LoraAdapter(LowRankAdapter[LoraConfig, LoraLinear | LoraEmbedding | LoraExperts]):
    """LoRA, rsLoRA and DoRA on linears, experts and embeddings."""

    _total_steps = 0

    # -- building ------------------------------------------------------------------------------

    def attach_to_model(self, model: nn.Module) -> None:
        """Wrap the targets. See ``LowRankAdapter``."""
        modules = list(model.named_modules())
        self._all_stacks = [name for name, m in modules if isinstance(m, ExpertStack)]
        super().attach_to_model(model)
        link_siblings(self.layers)

    def _list_target_names(self, model: nn.Module) -> list[str]:
        names = super()._list_target_names(model)
        return [*names, _find_input_embedding(model)] if self.config.embeddings else names

    def _build_layer(
        self, name: str, module: nn.Module
    ) -> LoraLinear | LoraEmbedding | LoraExperts:
        config = self.config
        r, alpha = self._resolve_rank_and_alpha(name)
        most_rank = round(r * config.init_rho) if config.init == "eva" else r
        spec = LoraSpec(
            r=most_rank,
            scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
            arithmetic=self.arithmetic,
            seed=self.seed,
            dora=config.use_dora,
            init=config.init,
            iterations=config.init_iterations,
            keep_zeros=config.keep_zeros,
        )
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, name, spec)
        dropout = SampleDropout(config.dropout, name, self.position)
        if isinstance(module, ExpertStack):
            self._check_expert_stack(name)
            if not config.through_quantizer:
                return LoraExperts(module, name, spec, dropout)
            require_codec(name, module)
            return ThroughExperts(module, name, spec, dropout)
        assert isinstance(module, FrozenLinear)
        if config.init == "loftq" and not module.codec.is_quantized:
            raise UserError(
                f"adapter.init loftq fits the quantization error, but {name} is not quantized; "
                "set base.quant, take the module out of adapter.target_modules, or use another "
                "adapter.init"
            )
        if config.init in RESIDUAL_INITS and module.stored is not None:
            raise UserError(
                f"adapter.init {config.init} changes the base's weights before they are quantized, "
                f"but {name} comes quantized from base.path; set adapter.init: default, or give "
                "the unquantized base"
            )
        self._check_rank(name, module, 2 * r if config.init == "lora_ga" else most_rank)
        if config.through_quantizer:
            require_codec(name, module)
            layer = ThroughLinear(module, name, spec, dropout)
            if config.through_zeros:
                require_trainable_zeros(name, module)
                layer.train_zeros()
            return layer
        return LoraLinear(module, name, spec, dropout)

    def _check_rank(self, name: str, module: FrozenLinear, wanted: int) -> None:
        """Check that the initialization has ``wanted`` directions in a linear."""
        config = self.config
        most = min(module.in_features, module.out_features)
        if config.init == "default" or wanted <= most:
            return
        needs = {"lora_ga": f"twice adapter.r, {wanted}", "eva": f"adapter.r * init_rho, {wanted}"}
        raise UserError(
            f"adapter.init {config.init} needs a rank of at most {most} in {name} "
            f"[{module.out_features}, {module.in_features}], not "
            f"{needs.get(config.init, wanted)}; lower adapter.r or adapter.rank_pattern"
        )

    def _check_expert_stack(self, name: str) -> None:
        config = self.config
        excluded = {
            "through_zeros": config.through_zeros,
            "use_dora": config.use_dora,
            "keep_zeros": config.keep_zeros,
            f"init {config.init}": config.init != "default",
        }
        for key, is_set in excluded.items():
            if is_set:
                raise UserError(
                    f"adapter.{key} is not for experts such as {name}: their adapters have PEFT's "
                    "form (target_parameters), without DoRA, masks and other "
                    "initializations; leave it out, or list adapter.target_modules without "
                    "experts, such as [q_proj, k_proj, v_proj, o_proj]"
                )

    # -- training ------------------------------------------------------------------------------

    def plan_steps(self, total_steps: int) -> None:
        """Report the zeros that stay, with ``adapter.keep_zeros``. See ``StepHooks``.

        Raises:
            UserError: the base has none.
        """
        self._total_steps = total_steps
        if not self.config.keep_zeros:
            return
        linears = [layer for layer in self.layers.values() if isinstance(layer, LoraLinear)]
        zeros = sum(layer.num_zeros for layer in linears)
        if not zeros:
            raise UserError(
                "adapter.keep_zeros keeps the zeros of a pruned base, and no weight of the "
                f"{len(linears)} adapted linears is zero; give the output of dist-peft prune as "
                "base.path, or leave keep_zeros out"
            )
        share = zeros / sum(layer.base.in_features * layer.base.out_features for layer in linears)
        log.info(
            "adapter.keep_zeros: %.1f %% of the weights of %d linears are zero and stay zero",
            100 * share,
            len(linears),
        )

    def get_lr_scale(self, name: str) -> float:
        return self.config.lr_ratio if name.endswith((".lora_B", ".zero_B")) else 1.0

    def prepare_phase(self, done: int, total_steps: int) -> int:
        """Give the linears the form of ``adapter.through_start``, in the first share of the steps.
        See ``StepHooks``."""
        config = self.config
        found: Iterable[object] = self.layers.values()
        layers = [layer for layer in found if isinstance(layer, ThroughRows)]
        start = resolve_start(config.through_start, layers)
        end = round(config.through_start_share * total_steps)
        if start == "none" or done >= end or not layers:
            return total_steps
        for layer in layers:
            layer.set_start(start)
        return end

    def finish_step(self, done: int, access: ParameterAccess) -> None:
        """Encode the base's rows again, where they are trained through the quantizer."""
        if self.config.through_quantizer:
            update_rows(self.layers.items(), access, count=done == self._total_steps)

    def finish_load(self, access: ParameterAccess) -> None:
        """The same for factors that come from a checkpoint."""
        if self.config.through_quantizer:
            update_rows(self.layers.items(), access, count=True)

    def list_init_factors(self) -> tuple[str, ...]:
        return tuple(
            f"{path}.{name}"
            for path, layer in self.layers.items()
            if isinstance(layer, LoraLinear)
            for name in layer.start_names
        )

    def set_init_factors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore initial factors from a checkpoint.

        Raises:
            UserError: a factor is absent or has another shape.
        """
        for path, layer in self.layers.items():
            if not isinstance(layer, LoraLinear) or not layer.start_names:
                continue
            for name in layer.start_names:
                value = tensors.get(f"{path}.{name}")
                if value is None or tuple(value.shape) != layer.shapes[name]:
                    found = "is absent" if value is None else f"has shape {list(value.shape)}"
                    raise UserError(
                        f"checkpoint: {path}.{name} {found}, not {list(layer.shapes[name])}; it "
                        "was written with another adapter.init, adapter.r or target: resume with "
                        "the configuration it was written with"
                    )
            layer.load_initial_values(
                {name: tensors[f"{path}.{name}"] for name in layer.start_names}
            )

    # -- saving --------------------------------------------------------------------------------

    def get_export_limits(self, tied: bool) -> ExportLimits:
        if self.config.through_quantizer:
            return ExportLimits(
                separate=_THROUGH_REASON,
                adapter=_THROUGH_REASON,
                trained_codes=True,
                fractional_zeros=self.config.through_zeros,
            )
        apart = _MASKED_APART if self.config.keep_zeros else None
        if not (self.config.embeddings and tied):
            return ExportLimits(separate=apart, adapter=apart)
        return ExportLimits(
            separate=apart,
            adapter=apart,
            merged="adapter.embeddings adapts an embedding that the base's output head shares: one "
            "merged weight cannot be both; set adapter.embeddings: false to merge",
        )

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``adapters.directory``."""
        whole = self._collect_gathered(tensors, leave_out=("base_norm2",))
        stacks = [name for name, layer in self.layers.items() if isinstance(layer, LoraExperts)]
        modules: dict[str, Mapping[str, Tensor]] = {
            to_public_expert_path(n, stacks) if n in stacks else n: own for n, own in whole.items()
        }
        weights = self._list_weight_initialized()
        parameters = [*stacks, *(f"{name}.weight" for name in weights)]
        others = [*self._all_stacks, *(f"{name}.weight" for name in self._all_names)]
        ranks: dict[str, int] = {}
        if self.config.init == "eva" and self.config.init_rho > 1:
            modules, ranks = drop_unused_ranks(modules)
        unused = [name for name, rank in ranks.items() if not rank]
        public = build_public_lora(
            self.config,
            modules,
            self._list_adapted_names(leave_out=[*stacks, *weights, *unused]),
            base,
            list_target_parameters(parameters, others),
            {name: rank for name, rank in ranks.items() if rank},
        )
        return mark_transposed(public, self.layers.values())

    def _list_weight_initialized(self) -> list[str]:
        """Linears that ``target_modules`` of PEFT cannot name (see
        ``adapters.lora.expert_format``)."""
        if not self._all_stacks or self.config.use_dora:
            return []
        linears = (name for name, layer in self.layers.items() if isinstance(layer, LoraLinear))
        return [name for name in linears if is_taken_for_experts(name)]


_THROUGH_REASON = (
    "adapter.through_quantizer trained the merged weights quantize(W + s B A): base and adapter "
    "apart are another model; use dist-peft merge, or a format of merged weights"
)


def _find_input_embedding(model: nn.Module) -> str:
    """Name of the input embedding of a ``transformers`` model."""
    embedding = cast(Callable[[], nn.Module], model.get_input_embeddings)()
    if isinstance(embedding, FrozenEmbedding):
        raise UserError(
            "adapter.embeddings adapts an embedding that is not packed, and base.quant.embeddings "
            "packs it; set one of them to false"
        )
    if not isinstance(embedding, nn.Embedding):
        raise UserError(
            f"adapter.embeddings: the input embedding is a {type(embedding).__name__}, which "
            "cannot be adapted; set it to false"
        )
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(embedding)]
