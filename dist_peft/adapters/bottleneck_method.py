"""The adapter method ``bottleneck``: Houlsby, Pfeiffer and parallel adapters on any base.

Nothing is wrapped: an adapter is a child of its block, so that engines gather it with the block,
and hooks on the block's other children bring it ``x`` and ``f`` (``adapters.bottleneck``). Layer
norms that learn (``train_layernorm``, as Houlsby et al. do) are wrapped, those outside of the
blocks too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.adapterhub_format import (
    Described,
    bottleneck_tensors,
    is_adapterhub,
    public_bottleneck,
    read_settings,
)
from dist_peft.adapters.base import PlainAdapter, PublicAdapter, whole_parameters
from dist_peft.adapters.bottleneck import BottleneckLayer, BottleneckSpec, TrainedNorm
from dist_peft.adapters.bottleneck_sites import Site, find_sites, hidden_size, is_norm
from dist_peft.adapters.dropout import DropoutPosition, RowDropout
from dist_peft.adapters.peft_format import read_adapter
from dist_peft.core.config import BottleneckConfig
from dist_peft.core.errors import UserError

__all__ = ["BottleneckAdapter"]


class BottleneckAdapter(PlainAdapter):
    """See the module docstring and ``adapters.base.Adapter``.

    Attributes:
        layers: the adapters by path, once attached.
        norms: the learning norms by path.
        position: what dropout masks depend on.
    """

    def __init__(self, config: BottleneckConfig, *, seed: int, arithmetic: torch.dtype) -> None:
        self.config, self.seed, self.arithmetic = config, seed, arithmetic
        self.position = DropoutPosition(seed)
        self.layers: dict[str, BottleneckLayer] = {}
        self.norms: dict[str, TrainedNorm] = {}

    # -- building ------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Put adapters into the blocks and hook their neighbours. See ``Adapter``.

        Raises:
            UserError: blocks of an unknown structure; ``init_from`` does not fit.
        """
        self.model = model
        hidden = hidden_size(model)
        found = list(find_sites(model, self.config.placement))
        if self.config.train_layernorm:
            self._wrap_norms(model, hidden)
        for path, sites in found:
            block = model.get_submodule(path)
            for site in sites:
                layer = self._layer(f"{path}.{site.name}", block.get_submodule(site.output), site)
                self.layers[layer.path] = layer
                _hook(block, site, layer)
        if self.config.init_from is not None:
            self._give_start(Path(self.config.init_from))

    def _layer(self, path: str, base: nn.Module, site: Site) -> BottleneckLayer:
        config, hidden = self.config, hidden_size(self.model)
        spec = BottleneckSpec(
            hidden=hidden,
            bottleneck=config.bottleneck(hidden),
            activation=config.activation,
            scaling=config.scaling,
            reads=site.reads,
            init=config.init,
            arithmetic=self.arithmetic,
            seed=self.seed,
        )
        return BottleneckLayer(base, path, spec, RowDropout(config.dropout, path, self.position))

    def _give_start(self, directory: Path) -> None:
        """Start from an adapter on disk, which must be one of the same settings."""
        public = read_adapter(directory)
        if not is_adapterhub(public.config):
            raise UserError(f"adapter.init_from {directory} is a PEFT adapter, no bottleneck")
        found = read_settings(public.config)
        for name in ("placement", "reduction_factor", "activation", "scaling", "train_layernorm"):
            mine, its = getattr(self.config, name), getattr(found, name)
            if mine != its:
                raise UserError(
                    f"adapter.{name} is {mine}, but adapter.init_from {directory} has {its}; "
                    "give the same"
                )
        tensors = bottleneck_tensors(public)
        fitted = {path: _fitting(path, tensors) for path in self.layers}
        hidden = hidden_size(self.model)
        if sorted(fitted.values()) != sorted(tensors) or public.config["hidden_size"] != hidden:
            raise UserError(
                f"adapter.init_from {directory} has {len(tensors)} adapters for a hidden size of "
                f"{public.config['hidden_size']}, such as {min(tensors)}; base.path needs "
                f"{len(self.layers)} for {hidden}, such as {min(self.layers)}: it was trained on "
                "another base"
            )
        for path, layer in self.layers.items():
            layer.give_start(tensors[fitted[path]])
        for path, norm in self.norms.items():
            norm.give_start({n: public.extra[f"{path}.{n}"] for n in norm.shapes})

    def _wrap_norms(self, model: nn.Module, hidden: int) -> None:
        for path, module in list(model.named_modules()):
            if is_norm(module, hidden):
                self.norms[path] = norm = TrainedNorm(module)
                parent, _, own = path.rpartition(".")
                setattr(model.get_submodule(parent), own, norm)

    # -- training ------------------------------------------------------------------------------

    def begin(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin(step, sample_ids)

    # -- saving --------------------------------------------------------------------------------

    def to_public(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """AdapterHub's form. See ``Adapter`` and ``adapterhub_format``."""
        config = cast(Any, self.model).config
        described = Described(
            base=base,
            model_class=type(self.model).__name__,
            model_type=config.model_type,
            hidden=hidden_size(self.model),
        )
        return public_bottleneck(
            self.config,
            described,
            whole_parameters(tensors, self._shapes(self.layers)),
            whole_parameters(tensors, self._shapes(self.norms)),
        )

    @staticmethod
    def _shapes(
        modules: Mapping[str, BottleneckLayer] | Mapping[str, TrainedNorm],
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        return {path: module.shapes for path, module in modules.items()}


def _hook(block: nn.Module, site: Site, layer: BottleneckLayer) -> None:
    """Make ``layer`` a child of ``block`` that changes the output of ``site.output``."""
    setattr(block, site.name, layer)
    seen: list[Tensor] = []  # between the two hooks; empty outside of the block's forward

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0]]

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        stream = seen.pop() if seen else None
        if isinstance(output, tuple):
            return layer(output[0], stream), *output[1:]
        return layer(output, stream)

    if site.reads != "output":
        block.get_submodule(site.stream).register_forward_pre_hook(note)
    block.get_submodule(site.output).register_forward_hook(change)


def _fitting(path: str, known: Mapping[str, object]) -> str:
    """The name for ``path`` of a file that may come from a model without its head's prefix."""
    return next((name for name in known if f".{path}".endswith(f".{name}")), "")
