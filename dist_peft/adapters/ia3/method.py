"""The adapter method ``ia3``: rescaling vectors on a frozen base (``adapters.ia3.layer``)."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_peft.adapters.ia3.format import public_ia3
from dist_peft.adapters.ia3.layer import Ia3Linear
from dist_peft.adapters.peft_tensors import mark_transposed
from dist_peft.adapters.protocol import (
    AdapterDefaults,
    ExportLimits,
    PublicAdapter,
    collect_gathered_parameters,
)
from dist_peft.adapters.targets import list_adapter_targets
from dist_peft.core.config.run import Ia3Config
from dist_peft.core.errors import UserError
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["Ia3Adapter"]

_FEEDFORWARD = "down_proj"


class Ia3Adapter(AdapterDefaults):
    """Wraps linears with a rescaling vector each.

    Attributes:
        layers: the wrappers by path, once attached.
    """

    def __init__(self, config: Ia3Config) -> None:
        self.config = config
        self.layers: dict[str, Ia3Linear] = {}
        self._all_names: list[str] = []

    def attach_to_model(self, model: nn.Module) -> None:
        """Wrap the targets. See ``Adapter``.

        Raises:
            UserError: an entry matches nothing; a target is an embedding or a mixture's experts; or
                an entry of ``feedforward_modules`` matches no target.
        """
        modules = dict(model.named_modules())
        _refuse_embeddings(self.config.target_modules, modules)
        names = list_adapter_targets(self.config.target_modules, model)
        _refuse_experts(names, modules)
        rescales_input = self._feedforward(names)
        self._all_names = list(modules)
        for name in names:
            base = modules[name]
            assert isinstance(base, FrozenLinear)
            layer = Ia3Linear(base, name, rescales_input=name in rescales_input)
            self.layers[name] = layer
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)

    def _feedforward(self, names: Sequence[str]) -> set[str]:
        """The targets whose input is rescaled."""
        entries = self.config.feedforward_modules
        if entries is None:
            return {name for name in names if _is_or_ends_with(name, _FEEDFORWARD)}
        found: set[str] = set()
        for entry in entries:
            matched = {name for name in names if _is_or_ends_with(name, entry)}
            if not matched:
                known = sorted({name.rpartition(".")[2] for name in names})
                raise UserError(
                    f"adapter.feedforward_modules entry {entry!r} is the name or name ending of no "
                    f"target; adapter.target_modules has {', '.join(known)}"
                )
            found |= matched
        return found

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        pass  # nothing is random

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return ExportLimits(
            gptq_linears="PEFT does not support IA3 on GPTQ linears (or --merge --lossy)"
        )

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``adapters.ia3.format``."""
        whole = collect_gathered_parameters(
            tensors, {path: m.shapes for path, m in self.layers.items()}
        )
        vectors = {path: own["ia3_l"] for path, own in whole.items()}
        feedforward = {path for path, layer in self.layers.items() if layer.rescales_input}
        public = public_ia3(vectors, feedforward, self._all_names, base)
        return mark_transposed(public, self.layers.values())


def _is_or_ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _refuse_embeddings(targets: str | Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    for entry in [targets] if isinstance(targets, str) else targets:
        for name, module in modules.items():
            if isinstance(module, nn.Embedding) and _is_or_ends_with(name, entry):
                raise UserError(
                    f"adapter.target_modules entry {entry!r} is the embedding {name}; IA3 rescales "
                    "linears only: take it out, or use adapter.kind lora with embeddings: true"
                )


def _refuse_experts(names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    stack = next((name for name in names if isinstance(modules[name], ExpertStack)), None)
    if stack is not None:
        raise UserError(
            f"adapter.kind ia3 is not for experts such as {stack}; list adapter.target_modules "
            "without experts, such as [k_proj, v_proj], or use adapter.kind lora"
        )
