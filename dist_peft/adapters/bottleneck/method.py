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

from dist_peft.adapters.bottleneck.block_structure import (
    AdapterSite,
    find_adapter_sites,
    is_norm_module,
    read_hidden_size,
)
from dist_peft.adapters.bottleneck.format import (
    ModelDescription,
    is_adapterhub_config,
    parse_bottleneck_config,
    parse_bottleneck_tensors,
    to_public_bottleneck,
)
from dist_peft.adapters.bottleneck.layer import BottleneckLayer, BottleneckSpec, TrainableNorm
from dist_peft.adapters.protocol import (
    NONLINEAR_LIMITS,
    AdapterDefaults,
    AdapterReader,
    ExportLimits,
    PublicAdapter,
    collect_gathered_parameters,
)
from dist_peft.core.config.run import BottleneckConfig
from dist_peft.core.errors import UserError
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout

__all__ = [
    "BottleneckAdapter",
    "build_bottleneck_spec",
    "insert_adapter_layer",
    "match_adapter_paths",
]


class BottleneckAdapter(AdapterDefaults):
    """Inserts a ``BottleneckLayer`` after or next to the sublayers of each block.

    Attributes:
        layers: the adapters by path, once attached.
        norms: the learning norms by path.
        position: step and samples that seed the dropout masks.
    """

    def __init__(
        self,
        config: BottleneckConfig,
        *,
        seed: int,
        arithmetic: torch.dtype,
        read_adapter: AdapterReader,
    ) -> None:
        self.config, self.seed, self.arithmetic = config, seed, arithmetic
        self._read_adapter = read_adapter
        self.position = DropoutPosition(seed)
        self.layers: dict[str, BottleneckLayer] = {}
        self.norms: dict[str, TrainableNorm] = {}

    # -- building ------------------------------------------------------------------------------

    def attach_to_model(self, model: nn.Module) -> None:
        """Put adapters into the blocks and hook their neighbours. See ``Adapter``.

        Raises:
            UserError: blocks of an unknown structure; ``init_from`` does not fit.
        """
        self.model = model
        hidden = read_hidden_size(model)
        self.described = ModelDescription.describe_model(model, hidden)
        found = list(find_adapter_sites(model, self.config.placement))
        if self.config.train_layernorm:
            self._wrap_trainable_norms(model, hidden)
        for path, sites in found:
            block = model.get_submodule(path)
            for site in sites:
                layer = self._build_layer(block, site.join_block_path(path), site)
                self.layers[layer.path] = layer
                insert_adapter_layer(block, site, layer)
        if self.config.init_from is not None:
            self._load_initial_adapter(Path(self.config.init_from))

    def _build_layer(self, block: nn.Module, path: str, site: AdapterSite) -> BottleneckLayer:
        hidden = read_hidden_size(self.model)
        spec = build_bottleneck_spec(
            self.config, hidden, site, arithmetic=self.arithmetic, seed=self.seed
        )
        dropout = SampleDropout(self.config.dropout, path, self.position)
        norm = None if site.norm is None else block.get_submodule(site.norm)
        return BottleneckLayer(block.get_submodule(site.output), path, spec, dropout, norm)

    def _load_initial_adapter(self, directory: Path) -> None:
        """Start from an adapter on disk, which must be one of the same settings."""
        public = self._read_adapter(directory)
        if not is_adapterhub_config(public.config):
            raise UserError(f"adapter.init_from {directory} is a PEFT adapter, no bottleneck")
        found = parse_bottleneck_config(public.config)
        for name in ("placement", "reduction_factor", "activation", "scaling", "train_layernorm"):
            mine, its = getattr(self.config, name), getattr(found, name)
            if mine != its:
                raise UserError(
                    f"adapter.{name} is {mine}, but adapter.init_from {directory} has {its}; "
                    "give the same"
                )
        tensors = parse_bottleneck_tensors(public)
        what, its = f"adapter.init_from {directory}", int(public.config["hidden_size"])
        fitted = match_adapter_paths(
            what, list(self.layers), read_hidden_size(self.model), tensors, its
        )
        for path, layer in self.layers.items():
            layer.load_initial_values(tensors[fitted[path]])
        for path, norm in self.norms.items():
            norm.load_initial_values({n: public.extra[f"{path}.{n}"] for n in norm.shapes})

    def _wrap_trainable_norms(self, model: nn.Module, hidden: int) -> None:
        for path, module in list(model.named_modules()):
            if is_norm_module(module, hidden):
                self.norms[path] = norm = TrainableNorm(module)
                parent, _, own = path.rpartition(".")
                setattr(model.get_submodule(parent), own, norm)

    # -- training ------------------------------------------------------------------------------

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin_micro_batch(step, sample_ids)

    # -- saving --------------------------------------------------------------------------------

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return NONLINEAR_LIMITS

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """AdapterHub's form. See ``Adapter`` and ``adapters.bottleneck.format``."""
        return to_public_bottleneck(
            self.config,
            replace(self.described, base=base),
            collect_gathered_parameters(tensors, self._list_parameter_shapes(self.layers)),
            collect_gathered_parameters(tensors, self._list_parameter_shapes(self.norms)),
        )

    @staticmethod
    def _list_parameter_shapes(
        modules: Mapping[str, BottleneckLayer] | Mapping[str, TrainableNorm],
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        return {path: module.shapes for path, module in modules.items()}


def build_bottleneck_spec(
    config: BottleneckConfig, hidden: int, site: AdapterSite, *, arithmetic: torch.dtype, seed: int
) -> BottleneckSpec:
    """Return the settings of the adapter at ``site`` in a base of this hidden size."""
    return BottleneckSpec(
        hidden=hidden,
        bottleneck=config.bottleneck_size(hidden),
        activation=config.activation,
        scaling=config.scaling,
        reads=site.reads,
        init=config.init,
        arithmetic=arithmetic,
        seed=seed,
    )


def insert_adapter_layer(block: nn.Module, site: AdapterSite, layer: nn.Module) -> None:
    """Make ``layer`` a part of ``block`` that turns the output of ``site.output`` and the residual
    stream into another output."""
    setattr(block.get_submodule(site.parent), site.name, layer)
    seen: list[Tensor] = []  # between the two hooks; empty outside of the block's forward

    def record_block_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[site.argument]]

    def adapt_block_output(module: nn.Module, args: Any, output: Any) -> Any:
        stream = seen.pop() if seen else None
        if isinstance(output, tuple):
            return layer(output[0], stream), *output[1:]
        return layer(output, stream)

    if site.reads != "output":
        block.get_submodule(site.stream).register_forward_pre_hook(record_block_input)
    block.get_submodule(site.output).register_forward_hook(adapt_block_output)


def match_adapter_paths(
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
