"""The adapter method ``fusion``: AdapterFusion over trained bottleneck adapters on any base.

At each place the fusion stands where an adapter would stand (``adapters.bottleneck.method``), and
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
from dist_peft.adapters.bottleneck.block_structure import (
    AdapterSite,
    find_adapter_sites,
    read_hidden_size,
)
from dist_peft.adapters.bottleneck.format import (
    BottleneckFormat,
    ModelDescription,
    build_adapterhub_key,
    is_adapterhub_config,
    parse_bottleneck_config,
    parse_bottleneck_tensors,
    to_public_bottleneck,
)
from dist_peft.adapters.bottleneck.layer import BottleneckLayer, Rows
from dist_peft.adapters.bottleneck.method import (
    build_bottleneck_spec,
    insert_adapter_layer,
    match_adapter_paths,
)
from dist_peft.adapters.fusion.attention_meter import AttentionMeter
from dist_peft.adapters.fusion.format import (
    CONFIG,
    is_fusion_config,
    list_fused_names,
    parse_fusion_tensors,
    to_public_fusion,
)
from dist_peft.adapters.fusion.layer import FusionLayer, IdentityRegularizer
from dist_peft.adapters.protocol import (
    NONLINEAR_LIMITS,
    AdapterDefaults,
    AdapterReader,
    ExportLimits,
    PublicAdapter,
    collect_gathered_parameters,
)
from dist_peft.adapters.tensor_checks import check_tensor_values
from dist_peft.core.config.adapter import BottleneckConfig, FusedAdapter, FusionConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["FusionAdapter"]


class FusionAdapter(AdapterDefaults):
    """Trains an attention over adapters on disk, which stay frozen.

    Attributes:
        layers: the fusions by path, once attached.
        sources: the fused adapters, once attached.
        position: step and samples that seed the dropout masks.
        pull: the penalty on ``V``.
        meter: records the attention weights.
    """

    def __init__(
        self,
        config: FusionConfig,
        *,
        seed: int,
        arithmetic: torch.dtype,
        read_adapter: AdapterReader,
    ) -> None:
        self.config, self.seed, self.arithmetic = config, seed, arithmetic
        self._read_adapter = read_adapter
        self.position = DropoutPosition(seed)
        self.pull = IdentityRegularizer(config.regularization)
        self.meter = AttentionMeter()
        self.layers: dict[str, FusionLayer] = {}
        self.sources: list[_FusedAdapterSource] = []

    # -- building ------------------------------------------------------------------------------

    def attach_to_model(self, model: nn.Module) -> None:
        """Put a fusion and its adapters into each place. See ``Adapter``.

        Raises:
            UserError: blocks of an unknown structure; adapters that do not fit each other or the
                base; ``init_from`` does not fit.
        """
        self.model = model
        self.described = ModelDescription.describe_model(model, read_hidden_size(model))
        self.sources = [
            _FusedAdapterSource.open_adapter(adapter, self._read_adapter)
            for adapter in self.config.adapters
        ]
        placement = self._placement()
        sites = [
            (path, site) for path, sites in find_adapter_sites(model, placement) for site in sites
        ]
        mine, hidden = [site.join_block_path(path) for path, site in sites], read_hidden_size(model)
        for source in self.sources:
            source.match_model_paths(mine, hidden)
        for path, site in sites:
            block = model.get_submodule(path)
            layer = self._build_layer(block, site.join_block_path(path), site)
            self.layers[layer.path] = layer
            insert_adapter_layer(block, site, layer)
        if self.config.init_from is not None:
            self._load_initial_fusion(Path(self.config.init_from), hidden)

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

    def _build_layer(self, block: nn.Module, path: str, site: AdapterSite) -> FusionLayer:
        hidden, base = read_hidden_size(self.model), block.get_submodule(site.output)
        norm = None if site.norm is None else block.get_submodule(site.norm)
        silent = SampleDropout(0.0, path, self.position)
        adapters = {}
        for number, source in enumerate(self.sources):
            spec = build_bottleneck_spec(
                source.config, hidden, site, arithmetic=self.arithmetic, seed=self.seed
            )
            own = f"{path}.adapters.{number}"
            adapter = BottleneckLayer(base, own, spec, silent, norm, train=False)
            adapter.load_initial_rows(source.read_layer_rows(path, adapter.shapes))
            adapters[source.name] = adapter
        dropout = SampleDropout(self.config.dropout, path, self.position)
        return FusionLayer(base, path, adapters, dropout, self.pull, self.meter, seed=self.seed)

    def _load_initial_fusion(self, directory: Path, hidden: int) -> None:
        public, what = self._read_adapter(directory), f"adapter.init_from {directory}"
        if not is_fusion_config(public.config):
            raise UserError(
                f"{what} is no fusion; give a directory with adapter_fusion_config.json"
            )
        names, its = [s.name for s in self.sources], list_fused_names(public.config)
        if names != its:
            raise UserError(
                f"{what} fuses {', '.join(its)}, and adapter.adapters are {', '.join(names)}; give "
                "the same in the same order"
            )
        tensors = parse_fusion_tensors(public)
        found = match_adapter_paths(
            what, list(self.layers), hidden, tensors, int(public.config["hidden_size"])
        )
        for path, layer in self.layers.items():
            layer.load_initial_values(tensors[found[path]])

    # -- training ------------------------------------------------------------------------------

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin_micro_batch(step, sample_ids)

    def add_penalty_gradient(self, loss: Tensor, parts: float) -> None:
        self.pull.attach_to_loss(loss, parts)

    def input_fingerprint(self) -> str:
        return " ".join(source.index.compute_fingerprint() for source in self.sources)

    # -- saving --------------------------------------------------------------------------------

    def get_export_limits(self, tied: bool) -> ExportLimits:
        return NONLINEAR_LIMITS

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """AdapterHub's form. See ``Adapter`` and ``adapters.fusion.format``."""
        described = replace(self.described, base=base)
        parts = {}
        for number, source in enumerate(self.sources):
            modules = {path: layer.adapters[number] for path, layer in self.layers.items()}
            shapes = {
                cast(BottleneckLayer, m).path: cast(BottleneckLayer, m).shapes
                for m in modules.values()
            }
            whole = collect_gathered_parameters(tensors, shapes)
            own = dict(zip(modules, whole.values(), strict=True))
            parts[source.name] = to_public_bottleneck(
                source.config, described, own, {}, name=source.name
            )
        fused = {path: layer.shapes for path, layer in self.layers.items()}
        return to_public_fusion(
            [source.name for source in self.sources],
            described,
            collect_gathered_parameters(tensors, fused),
            parts,
            regularized=self.config.regularization > 0,
            dropout=self.config.dropout,
        )


@dataclass
class _FusedAdapterSource:
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
    def open_adapter(cls, adapter: FusedAdapter, read_adapter: AdapterReader) -> Self:
        """Look at names and shapes, not at values.

        Raises:
            UserError: no bottleneck adapter, one with norms of its own, or a damaged one.
        """
        directory, what = Path(adapter.path), f"adapter.adapters: {adapter.path}"
        if not any((directory / name).is_file() for name in (BottleneckFormat.config_file, CONFIG)):
            raise UserError(
                f"{what} has no adapter_config.json; give the adapter/ of a finished run "
                "(RUN/adapter, RUN/tasks/NAME/adapter), or one saved by AdapterHub's library"
            )
        public = read_adapter(directory, values=False)
        if not is_adapterhub_config(public.config) or is_fusion_config(public.config):
            raise UserError(f"{what} is no bottleneck adapter; others cannot be fused")
        config = parse_bottleneck_config(public.config)
        if config.train_layernorm:
            raise UserError(
                f"{what} has layer norms of its own, which cannot be fused; train it without "
                "adapter.train_layernorm"
            )
        return cls(
            name=adapter.display_name,
            config=config,
            what=what,
            index=SafetensorsIndex.open(directory / adapterhub_format.TENSORS),
            paths=list(parse_bottleneck_tensors(public)),
            hidden=int(public.config["hidden_size"]),
            own=str(public.config["name"]),
            found={},
        )

    def match_model_paths(self, mine: Sequence[str], hidden: int) -> None:
        """Find the adapter's place in its file for each place of this model.

        Raises:
            UserError: it was trained on another base than one with these places.
        """
        self.found = match_adapter_paths(self.what, mine, hidden, self.paths, self.hidden)

    def read_layer_rows(self, path: str, names: Mapping[str, Any]) -> dict[str, Rows]:
        """Return readers of the parameters of the adapter at ``path``, by own name."""
        keys = {name: build_adapterhub_key(self.found[path], self.own, name) for name in names}
        return {name: partial(self._read_tensor_rows, key) for name, key in keys.items()}

    def _read_tensor_rows(self, key: str, span: Span) -> Tensor:
        """Read rows of a tensor.

        Raises:
            UserError: a value is NaN or infinite.
        """
        with RowReader(self.index) as reader:
            rows = reader.read_rows(key, span)
        check_tensor_values({key: rows}, self.what)
        return rows
