"""The adapter method ``fusion``: AdapterFusion over trained bottleneck adapters on any base.

At each place the fusion stands where an adapter would stand (``adapters.bottleneck_method``), and
has the adapters as its parts. These are frozen; each rank reads its own rows of them from their
files. Only the fusion is trained, checkpointed, and has optimizer state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.bottleneck import format as adapterhub_format
from dist_peft.adapters.bottleneck.block_structure import Site, find_sites, hidden_size
from dist_peft.adapters.bottleneck.format import (
    Described,
    bottleneck_tensors,
    is_adapterhub,
    public_bottleneck,
    read_settings,
    tensor_name,
)
from dist_peft.adapters.bottleneck.layer import BottleneckLayer, Rows
from dist_peft.adapters.bottleneck.method import match_paths, place, spec_of
from dist_peft.adapters.directory import config_file, read_adapter
from dist_peft.adapters.fusion.attention_meter import AttentionMeter
from dist_peft.adapters.fusion.format import (
    fusion_names,
    fusion_tensors,
    is_fusion,
    public_fusion,
)
from dist_peft.adapters.fusion.layer import FusionLayer, Pull
from dist_peft.adapters.protocol import PlainAdapter, PublicAdapter, whole_parameters
from dist_peft.adapters.sample_dropout import DropoutPosition, RowDropout
from dist_peft.core.config.adapter import BottleneckConfig, FusedAdapter, FusionConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["FusionAdapter"]


class FusionAdapter(PlainAdapter):
    """See the module docstring and ``adapters.base.Adapter``.

    Attributes:
        layers: the fusions by path, once attached.
        sources: the fused adapters, once attached.
        position: step and samples that seed the dropout masks.
        pull: the penalty on ``V``.
        meter: records the attention weights.
    """

    def __init__(self, config: FusionConfig, *, seed: int, arithmetic: torch.dtype) -> None:
        self.config, self.seed, self.arithmetic = config, seed, arithmetic
        self.position = DropoutPosition(seed)
        self.pull = Pull(config.regularization)
        self.meter = AttentionMeter()
        self.layers: dict[str, FusionLayer] = {}
        self.sources: list[_Source] = []

    # -- building ------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Put a fusion and its adapters into each place. See ``Adapter``.

        Raises:
            UserError: blocks of an unknown structure; adapters that do not fit each other or the
                base; ``init_from`` does not fit.
        """
        self.model = model
        self.described = Described.of(model, hidden_size(model))
        self.sources = [_Source.open(adapter) for adapter in self.config.adapters]
        placement = self._placement()
        sites = [(path, site) for path, sites in find_sites(model, placement) for site in sites]
        mine, hidden = [site.path_in(path) for path, site in sites], hidden_size(model)
        for source in self.sources:
            source.fit(mine, hidden)
        for path, site in sites:
            block = model.get_submodule(path)
            layer = self._layer(block, site.path_in(path), site)
            self.layers[layer.path] = layer
            place(block, site, layer)
        if self.config.init_from is not None:
            self._give_start(Path(self.config.init_from), hidden)

    def _placement(self) -> Any:
        first, *others = self.sources
        placement = first.config.placement
        for other in others:
            if other.config.placement != placement:
                raise UserError(
                    f"{first.what} has placement {placement}, {other.what} "
                    f"{other.config.placement}: adapters that are fused stand at the same places "
                    "and read the same; train them with one adapter.placement"
                )
        if placement == "parallel":
            raise UserError(
                f"{first.what} has placement parallel: AdapterFusion is made for adapters after a "
                "sublayer (AdapterHub's library would add the residual stream twice); fuse "
                "adapters of placement pfeiffer or houlsby"
            )
        return placement

    def _layer(self, block: nn.Module, path: str, site: Site) -> FusionLayer:
        hidden, base = hidden_size(self.model), block.get_submodule(site.output)
        norm = None if site.norm is None else block.get_submodule(site.norm)
        silent = RowDropout(0.0, path, self.position)
        adapters = {}
        for number, source in enumerate(self.sources):
            spec = spec_of(source.config, hidden, site, arithmetic=self.arithmetic, seed=self.seed)
            own = f"{path}.adapters.{number}"
            adapter = BottleneckLayer(base, own, spec, silent, norm, train=False)
            adapter.give_rows(source.rows(path, adapter.shapes))
            adapters[source.name] = adapter
        dropout = RowDropout(self.config.dropout, path, self.position)
        return FusionLayer(base, path, adapters, dropout, self.pull, self.meter, seed=self.seed)

    def _give_start(self, directory: Path, hidden: int) -> None:
        public, what = read_adapter(directory), f"adapter.init_from {directory}"
        if not is_fusion(public.config):
            raise UserError(
                f"{what} is no fusion; give a directory with adapter_fusion_config.json"
            )
        names, its = [s.name for s in self.sources], fusion_names(public.config)
        if names != its:
            raise UserError(
                f"{what} fuses {', '.join(its)}, and adapter.adapters are {', '.join(names)}; give "
                "the same in the same order"
            )
        tensors = fusion_tensors(public)
        found = match_paths(
            what, list(self.layers), hidden, tensors, int(public.config["hidden_size"])
        )
        for path, layer in self.layers.items():
            layer.give_start(tensors[found[path]])

    # -- training ------------------------------------------------------------------------------

    def begin(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin(step, sample_ids)

    def penalize(self, loss: Tensor, parts: int) -> None:
        self.pull.join(loss, parts)

    def reads(self) -> str:
        return " ".join(source.index.fingerprint() for source in self.sources)

    # -- saving --------------------------------------------------------------------------------

    def to_public(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """AdapterHub's form. See ``Adapter`` and ``fusion_format``."""
        described = replace(self.described, base=base)
        parts = {}
        for number, source in enumerate(self.sources):
            modules = {path: layer.adapters[number] for path, layer in self.layers.items()}
            shapes = {
                cast(BottleneckLayer, m).path: cast(BottleneckLayer, m).shapes
                for m in modules.values()
            }
            whole = whole_parameters(tensors, shapes)
            own = dict(zip(modules, whole.values(), strict=True))
            parts[source.name] = public_bottleneck(
                source.config, described, own, {}, name=source.name
            )
        fused = {path: layer.shapes for path, layer in self.layers.items()}
        return public_fusion(
            [source.name for source in self.sources],
            described,
            whole_parameters(tensors, fused),
            parts,
            regularized=self.config.regularization > 0,
            dropout=self.config.dropout,
        )


@dataclass
class _Source:
    """An adapter on disk that is fused.

    Attributes:
        name: in this fusion.
        config: its settings.
        what: key and directory, for messages.
        index: of its tensors.
        paths: its places, as the file calls them.
        hidden: of the base that it was trained on.
        own: its name in the file.
        found: path here -> path in the file, once it fits.
    """

    name: str
    config: BottleneckConfig
    what: str
    index: SafetensorsIndex
    paths: Sequence[str]
    hidden: int
    own: str
    found: dict[str, str]

    @classmethod
    def open(cls, adapter: FusedAdapter) -> Self:
        """Look at names and shapes, not at values.

        Raises:
            UserError: no bottleneck adapter, one with norms of its own, or a damaged one.
        """
        directory, what = Path(adapter.path), f"adapter.adapters: {adapter.path}"
        if not config_file(directory).is_file():
            raise UserError(
                f"{what} has no adapter_config.json; give the adapter/ of a finished run "
                "(RUN/adapter, RUN/tasks/NAME/adapter), or one saved by AdapterHub's library"
            )
        public = read_adapter(directory, values=False)
        if not is_adapterhub(public.config) or is_fusion(public.config):
            raise UserError(f"{what} is no bottleneck adapter; others cannot be fused")
        config = read_settings(public.config)
        if config.train_layernorm:
            raise UserError(
                f"{what} has layer norms of its own, which cannot be fused; train it without "
                "adapter.train_layernorm"
            )
        return cls(
            name=adapter.label,
            config=config,
            what=what,
            index=SafetensorsIndex.open(directory / adapterhub_format.TENSORS),
            paths=list(bottleneck_tensors(public)),
            hidden=int(public.config["hidden_size"]),
            own=str(public.config["name"]),
            found={},
        )

    def fit(self, mine: Sequence[str], hidden: int) -> None:
        """
        Raises:
            UserError: it was trained on another base than one with these places.
        """
        self.found = match_paths(self.what, mine, hidden, self.paths, self.hidden)

    def rows(self, path: str, names: Mapping[str, Any]) -> dict[str, Rows]:
        """Return readers of the parameters of the adapter at ``path``, by own name."""
        keys = {name: tensor_name(self.found[path], self.own, name) for name in names}
        return {name: partial(_read, self.index, key) for name, key in keys.items()}


def _read(index: SafetensorsIndex, key: str, span: Span) -> Tensor:
    with RowReader(index) as reader:
        return reader.read(key, span)
