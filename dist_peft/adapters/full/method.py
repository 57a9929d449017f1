"""The adapter methods ``full`` and ``partial``: parameters of the base itself are trained.

Which ones is chosen by parts and blocks; a shared parameter (an embedding tied to the head) is one,
whichever of its uses is named. A chosen parameter becomes a float32 master
(``adapters.full.master_weights``)
initialized from the rows of the base's files; a chosen weight of a linear is not quantized. All
else stays as it was: frozen, and quantized as ``base.quant`` says.

BitFit (Ben Zaken et al. 2021) is ``parts: [biases]``. Stages (``unfreeze``) train parameters in
some steps only: from the last blocks down, as in gradual unfreezing (Howard & Ruder 2018), or one
block after the other from the first on (greedy layer-wise training, Bengio et al. 2006). LISA (Pan
et al. 2024) is ``sample_blocks`` with ``parts: [embeddings, head]``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.full.master_weights import (
    MasterWeightLinear,
    StepCounter,
    TrainableSpec,
    use_master_weights,
)
from dist_peft.adapters.protocol import AdapterDefaults, ExportLimits, PublicAdapter
from dist_peft.core.config.adapter import Part
from dist_peft.core.config.run import FullConfig, PartialConfig, UnfreezeConfig
from dist_peft.core.errors import UserError
from dist_peft.core.trainable_steps import BlockSampling, SampledBlock, TrainableSteps
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight

__all__ = ["PartialAdapter"]

Chosen = dict[int, TrainableSteps]
"""``id`` of a parameter -> steps in which it is updated."""


class PartialAdapter(AdapterDefaults):
    """Trains weights of the base itself, all of them or those that the configuration names."""

    def __init__(
        self, config: FullConfig | PartialConfig, *, arithmetic: torch.dtype, seed: int = 0
    ) -> None:
        self.config, self.arithmetic, self.seed = config, arithmetic, seed
        self.clock = StepCounter()
        self._sources: dict[str, str] = {}
        self._steps: dict[str, TrainableSteps] = {}

    # -- building ------------------------------------------------------------------------------

    def attach_to_model(self, model: nn.Module) -> None:
        """Make the chosen parameters trainable.

        Raises:
            UserError: the model lacks a named parameter, or has it quantized.
        """
        chosen = _choose_parameters(model, self.config, self.seed)
        keep = list(model.parameters())  # alive while their ids are in use
        masters: dict[int, nn.Parameter] = {}
        for path, module in list(model.named_modules()):
            own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) in chosen}
            if not own:
                continue
            steps = {_to_base_name(name): chosen[id(p)] for name, p in own.items()}
            new = {}
            for name, parameter in own.items():
                if id(parameter) not in masters:
                    masters[id(parameter)] = _make_master_parameter(path, module, name)
                    self._record_trainable(path, module, name, chosen[id(parameter)])
                new[_to_base_name(name)] = masters[id(parameter)]
            self._replace_with_masters(model, path, module, new, steps)
        del keep

    def _record_trainable(
        self, path: str, module: nn.Module, name: str, steps: TrainableSteps
    ) -> None:
        full = f"{path}.{_to_base_name(name)}"
        self._sources[full] = cast(dict[str, str], module.checkpoint_names)[name]
        self._steps[full] = steps

    def _replace_with_masters(
        self,
        model: nn.Module,
        path: str,
        module: nn.Module,
        masters: dict[str, nn.Parameter],
        steps: dict[str, TrainableSteps],
    ) -> None:
        learning = TrainableSpec(steps, self.arithmetic, self.clock)
        is_linear = isinstance(module, FrozenLinear | nn.Linear)
        if is_linear and "weight" in masters:
            bias = cast(nn.Parameter | None, masters.get("bias", module.bias))
            names = cast(dict[str, str], module.checkpoint_names)
            names = {_to_base_name(name): source for name, source in names.items()}
            turned = isinstance(module, FrozenLinear) and module.is_transposed
            linear = MasterWeightLinear(masters["weight"], bias, learning, names, turned)
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, linear)
            return
        if isinstance(module, FrozenLinear):  # only its bias: the product is the base's affair
            assert module.bias is not None
            learning = TrainableSpec(steps, module.bias.dtype, self.clock)
        use_master_weights(module, masters, learning)

    # -- training ------------------------------------------------------------------------------

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        self.clock.step = step

    def get_trainable_steps(self, name: str) -> TrainableSteps:
        return self._steps[name]

    # -- saving --------------------------------------------------------------------------------

    def list_source_tensors(self) -> Mapping[str, str]:
        return self._sources

    def get_export_limits(self, tied: bool) -> ExportLimits:
        reason = f"adapter.kind {self.config.kind} trains weights, no adapter"
        return ExportLimits(separate=reason, adapter=reason)

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        raise RuntimeError("trained weights are written one by one (adapters.weights_format)")


def _to_base_name(name: str) -> str:
    """A frozen linear's packed parameter stands for its weight."""
    return "weight" if name == "packed" else name


def _make_master_parameter(path: str, module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    shape = tuple(parameter.shape)
    if isinstance(module, ExpertStack):
        raise UserError(
            f"{path} would learn, but the experts of a mixture stay frozen; choose adapter.parts "
            "without them (norms, biases, embeddings, head), or adapter.kind lora"
        )
    if isinstance(module, FrozenEmbedding) or _is_packed_head(module, name):
        raise UserError(
            f"{path} would learn, but base.quant.embeddings packs the input embedding and the "
            "output head, which then stay frozen; set it to false, or take them out of "
            "adapter.parts and adapter.unfreeze"
        )
    if isinstance(module, FrozenLinear) and name == "packed":
        if module.stored is not None:
            raise UserError(
                f"{path} would learn, but it comes quantized from base.path; give the unquantized "
                "base, or take it out of adapter.parts and adapter.last_blocks"
            )
        if module.pieces:
            raise UserError(
                f"{path} would learn, but the files have it as several tensors, such as "
                f"{module.source}; choose adapter.parts without it, or adapter.kind lora"
            )
        shape = (module.out_features, module.in_features)
        shape = shape[::-1] if module.is_transposed else shape
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=parameter.device))


def _is_packed_head(module: nn.Module, name: str) -> bool:
    if not isinstance(module, FrozenWeight) or name != "packed":
        return False
    return module.is_head and module.codec.is_quantized


# -- choosing ----------------------------------------------------------------------------------


def _choose_parameters(model: nn.Module, config: FullConfig | PartialConfig, seed: int) -> Chosen:
    """Return the steps of each parameter that a stage names or a sampled block has.

    Raises:
        UserError: a stage names a part or block that the model lacks.
    """
    chosen: Chosen = {}
    blocks = find_decoder_blocks(model)

    def choose(parameters: Iterable[nn.Parameter], steps: TrainableSteps) -> None:
        for parameter in parameters:
            known = chosen.get(id(parameter))
            chosen[id(parameter)] = steps if known is None else known.join(steps)

    for stage in config.unfreeze_stages:
        steps = TrainableSteps(((stage.step, stage.until),))
        for part in stage.parts:
            choose(_list_part_parameters(model, part), steps)
        for number in _list_stage_blocks(stage, len(blocks)):
            choose(blocks[number].parameters(), steps)
    sample = config.sample_blocks if isinstance(config, PartialConfig) else None
    if sample is not None:
        if sample.count > len(blocks):
            raise UserError(
                f"adapter.sample_blocks.count is {sample.count}, but the model has {len(blocks)} "
                "decoder blocks"
            )
        sampling = BlockSampling(seed, len(blocks), sample.count, sample.every)
        for number, block in enumerate(blocks):
            choose(block.parameters(), TrainableSteps((), SampledBlock(sampling, number)))
    return chosen


def _list_stage_blocks(stage: UnfreezeConfig, count: int) -> list[int]:
    """Return the numbers of the blocks of ``stage`` among ``count``."""
    key, most = "adapter.last_blocks", stage.last_blocks
    if stage.blocks and max(stage.blocks) >= count:
        key, most = "adapter.blocks", max(stage.blocks)
    elif most <= count:
        return sorted({*stage.blocks, *range(count - most, count)})
    raise UserError(f"{key}: {most}, but the model has {count} decoder blocks")


def _list_part_parameters(model: nn.Module, part: Part) -> list[nn.Parameter]:
    found = list(_PARTS[part](model))
    if not found and not (part == "head" and _is_classifier(model)):
        known = [name for name, find in _PARTS.items() if any(True for _ in find(model))]
        raise UserError(
            f"adapter.parts: a {type(model).__name__} of this config.json has no {part}; it has "
            f"{', '.join(known)}"
        )
    return found


def _iterate_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        flat = bool(own) and all(p.dim() == 1 for p in own) and not module._modules
        if flat and "norm" in type(module).__name__.lower():
            yield from own


def _iterate_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            yield bias


def _iterate_embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding | FrozenEmbedding):
            yield from module.parameters()


def _iterate_head(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield nothing for a classifier, whose head is trained anyway
    (``adapters.classifier_head.method``)."""
    if not _is_classifier(model):
        yield from cast(Any, model).get_output_embeddings().parameters()


def _is_classifier(model: nn.Module) -> bool:
    return cast(Any, model).get_output_embeddings() is None


_PARTS: dict[Part, Callable[[nn.Module], Iterator[nn.Parameter]]] = {
    "all": lambda model: model.parameters(),
    "norms": _iterate_norms,
    "biases": _iterate_biases,
    "embeddings": _iterate_embeddings,
    "head": _iterate_head,
}
