"""The adapter method ``bottleneck``: Houlsby, Pfeiffer and parallel adapters on any base.

Nothing is wrapped: an adapter is a part of its block, so that engines gather it with the block,
and hooks on the block's other parts bring it ``x`` and ``f`` (``adapters.bottleneck``). Layer
trainable norms (``train_layernorm``, as Houlsby et al. do) are wrapped, those outside of the
blocks too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.adapters.bottleneck.block_structure import Site, find_sites, hidden_size, is_norm
from dist_peft.adapters.bottleneck.format import (
    Described,
    bottleneck_tensors,
    is_adapterhub,
    public_bottleneck,
    read_settings,
)
from dist_peft.adapters.bottleneck.layer import BottleneckLayer, BottleneckSpec, TrainedNorm
from dist_peft.adapters.directory import read_adapter
from dist_peft.adapters.protocol import PlainAdapter, PublicAdapter, whole_parameters
from dist_peft.adapters.sample_dropout import DropoutPosition, RowDropout
from dist_peft.core.config.run import BottleneckConfig
from dist_peft.core.errors import UserError

__all__ = ["BottleneckAdapter", "match_paths", "place", "spec_of"]


class BottleneckAdapter(PlainAdapter):
    """See the module docstring and ``adapters.base.Adapter``.

    Attributes:
        layers: the adapters by path, once attached.
        norms: the learning norms by path.
        position: step and samples that seed the dropout masks.
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
        self.described = Described.of(model, hidden)
        found = list(find_sites(model, self.config.placement))
        if self.config.train_layernorm:
            self._wrap_norms(model, hidden)
        for path, sites in found:
            block = model.get_submodule(path)
            for site in sites:
                layer = self._layer(block, site.path_in(path), site)
                self.layers[layer.path] = layer
                place(block, site, layer)
        if self.config.init_from is not None:
            self._give_start(Path(self.config.init_from))

    def _layer(self, block: nn.Module, path: str, site: Site) -> BottleneckLayer:
        hidden = hidden_size(self.model)
        spec = spec_of(self.config, hidden, site, arithmetic=self.arithmetic, seed=self.seed)
        dropout = RowDropout(self.config.dropout, path, self.position)
        norm = None if site.norm is None else block.get_submodule(site.norm)
        return BottleneckLayer(block.get_submodule(site.output), path, spec, dropout, norm)

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
        what, its = f"adapter.init_from {directory}", int(public.config["hidden_size"])
        fitted = match_paths(what, list(self.layers), hidden_size(self.model), tensors, its)
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
        return public_bottleneck(
            self.config,
            replace(self.described, base=base),
            whole_parameters(tensors, self._shapes(self.layers)),
            whole_parameters(tensors, self._shapes(self.norms)),
        )

    @staticmethod
    def _shapes(
        modules: Mapping[str, BottleneckLayer] | Mapping[str, TrainedNorm],
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        return {path: module.shapes for path, module in modules.items()}


def spec_of(
    config: BottleneckConfig, hidden: int, site: Site, *, arithmetic: torch.dtype, seed: int
) -> BottleneckSpec:
    """Return the settings of the adapter at ``site`` in a base of this hidden size."""
    return BottleneckSpec(
        hidden=hidden,
        bottleneck=config.bottleneck(hidden),
        activation=config.activation,
        scaling=config.scaling,
        reads=site.reads,
        init=config.init,
        arithmetic=arithmetic,
        seed=seed,
    )


def place(block: nn.Module, site: Site, layer: nn.Module) -> None:
    """Make ``layer`` a part of ``block`` that turns the output of ``site.output`` and the residual
    stream into another output."""
    setattr(block.get_submodule(site.parent), site.name, layer)
    seen: list[Tensor] = []  # between the two hooks; empty outside of the block's forward

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[site.argument]]

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        stream = seen.pop() if seen else None
        if isinstance(output, tuple):
            return layer(output[0], stream), *output[1:]
        return layer(output, stream)

    if site.reads != "output":
        block.get_submodule(site.stream).register_forward_pre_hook(note)
    block.get_submodule(site.output).register_forward_hook(change)


def match_paths(
    what: str, mine: Sequence[str], hidden: int, its: Iterable[str], its_hidden: int
) -> dict[str, str]:
    """The path of each adapter here -> its path in a file, which may come from a model without its
    head's prefix.

    Args:
        what: key and directory, for the message.
        mine, its: paths of the adapters here and in the file.
        hidden, its_hidden: hidden size of the base, and of the one that the file is for.

    Raises:
        UserError: they are not the same adapters.
    """
    its = list(its)
    found = {p: next((n for n in its if f".{p}".endswith(f".{n}")), "") for p in mine}
    if sorted(found.values()) != sorted(its) or its_hidden != hidden:
        raise UserError(
            f"{what} has {len(its)} adapters for a hidden size of {its_hidden}, such as "
            f"{min(its)}; base.path needs {len(mine)} for {hidden}, such as {min(mine)}: it was "
            "trained on another base"
        )
    return found
