"""A classification head trained together with any adapter method.

The head (``model.classifier``) is trained whole, in float32, whatever the method does to the trunk.
No method knows about it: ``HeadedAdapter`` wraps the method, hides the head's parameters
while the method looks for its targets, and adds the trained head to the method's output::

    HeadedAdapter
      trunk         lora, bottleneck, partial, ...: the trunk
      HeadPart      classifier, score, pooler: float32 masters, cast where they compute

Parameters absent from the base's files are initialized as in ``transformers``: matrices normal with
``initializer_range``, biases zero, scales of norms one; from a generator that depends on the seed
and the parameter's name alone, so that any number of ranks starts with the same head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.classifier_head.around_method import AroundMethod
from dist_peft.adapters.classifier_head.discriminator import DomainDiscriminator
from dist_peft.adapters.classifier_head.trained_module import TrainedModule
from dist_peft.adapters.protocol import (
    Adapter,
    PublicAdapter,
    PublicHead,
    TrainsBaseWeights,
    collect_gathered_parameters,
)
from dist_peft.core.config.run import RunConfig
from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import ALWAYS, TrainableSteps
from dist_peft.model.classifier import ClassifierHead

__all__ = [
    "DiscriminatorSize",
    "HeadPart",
    "HeadSpec",
    "HeadedAdapter",
    "HeadedBaseWeights",
    "add_classifier_head",
    "choose_discriminator_size",
]


@dataclass(frozen=True)
class HeadSpec:
    """Settings that the parts of a head share.

    Attributes:
        deviation: of the start values of matrices.
        arithmetic: type in which the head computes.
        seed: of the run.
    """

    deviation: float
    arithmetic: torch.dtype
    seed: int


@dataclass(frozen=True)
class DiscriminatorSize:
    """Size of a ``DomainDiscriminator``: units of its hidden layer, number of domains."""

    hidden_size: int
    num_domains: int


class HeadPart(TrainedModule):
    """A module of the head.

    Args:
        base, path: see ``TrainedModule``.
        spec: settings that the parts share.

    Attributes:
        discriminator: sees the input too; None: there is none.
    """

    discriminator: DomainDiscriminator | None

    def __init__(self, base: nn.Module, path: str, spec: HeadSpec) -> None:
        super().__init__(base, path)
        self.spec, self.discriminator = spec, None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of ``base`` in the type of ``x``."""
        if self.discriminator is not None:
            # of the call, not in it: ZeRO-3 gathers before the gradient of what a call returns
            self.discriminator.logits = self.discriminator(x)
        dtype = self.spec.arithmetic
        y: Tensor = self.compute_rounded(dtype, x.to(dtype))
        return y.to(x.dtype)

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return the initial value of a parameter that the files lack."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full((len(span),), 0.0 if name == "bias" else 1.0)
        generator = torch.Generator().manual_seed(derive_seed(self.spec.seed, self.path, name))
        value = torch.empty(shape).normal_(std=self.spec.deviation, generator=generator)
        return value[span.slice].clone()


class HeadedAdapter(AroundMethod):
    """An ``Adapter`` that trains a classification head together with its method.

    Attributes:
        trunk: the adapter of the rest of the model.
        parts: the head's modules by path, once attached.
    """

    def __init__(
        self,
        trunk: Adapter,
        head: ClassifierHead,
        *,
        seed: int,
        arithmetic: torch.dtype,
        discriminator: DiscriminatorSize | None = None,
    ) -> None:
        self.trunk, self.head, self.seed, self.arithmetic = trunk, head, seed, arithmetic
        self.parts: dict[str, HeadPart] = {}
        self._discriminator = discriminator
        self._model_class = ""

    def attach_to_model(self, model: nn.Module) -> None:
        """Attach the method to the trunk and make the head trainable."""
        self._model_class = type(model).__name__  # FSDP2 will change it
        config = cast(Any, model).config
        deviation = getattr(config.get_text_config(), "initializer_range", None) or 0.02
        spec = HeadSpec(deviation, self.arithmetic, self.seed)
        for path in self.head.modules:
            self.parts[path] = HeadPart(model.get_submodule(path), path, spec)
        self.trunk.attach_to_model(model)
        if self._discriminator is not None:
            self._add_discriminator(list(self.parts.values())[-1], self._discriminator)
        for path, part in self.parts.items():
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, part)

    def _add_discriminator(self, part: HeadPart, size: DiscriminatorSize) -> None:
        columns = next(shape[1] for shape in part.shapes.values() if len(shape) == 2)
        path = f"{part.path}.discriminator"
        part.discriminator = DomainDiscriminator(
            path, columns, size.hidden_size, size.num_domains, seed=self.seed
        )

    def _is_discriminator_parameter(self, name: str) -> bool:
        return name.rpartition(".")[0].endswith(".discriminator") and self._is_head_parameter(
            name.rpartition(".")[0]
        )

    def get_lr_scale(self, name: str) -> float:
        if self._is_head_parameter(name) or self._is_discriminator_parameter(name):
            return 1.0
        return self.trunk.get_lr_scale(name)

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """The method's form with the head in it. See ``Adapter``."""
        others = {
            name: value
            for name, value in tensors.items()
            if not (self._is_head_parameter(name) or self._is_discriminator_parameter(name))
        }
        whole = collect_gathered_parameters(
            tensors, {path: p.shapes for path, p in self.parts.items()}
        )
        mine = {f"{path}.{name}": v for path, own in whole.items() for name, v in own.items()}
        head = PublicHead(self.head.labels, mine, self._model_class)
        return replace(self.trunk.to_public_adapter(others, base), head=head)

    def _is_head_parameter(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.parts


class HeadedBaseWeights(HeadedAdapter):
    """A method that trains weights of the base, with a head. See
    ``adapters.protocol.TrainsBaseWeights``.

    Parameters of the head that the base's files lack are written under the model's names.
    """

    def list_source_tensors(self) -> Mapping[str, str]:
        found = dict(cast(TrainsBaseWeights, self.trunk).list_source_tensors())
        for path, part in self.parts.items():
            for name in part.shapes:
                full = f"{path}.{name}"
                found[full] = part.checkpoint_names.get(name, full)
        return found

    def get_trainable_steps(self, name: str) -> TrainableSteps:
        if self._is_head_parameter(name) or self._is_discriminator_parameter(name):
            return ALWAYS
        return cast(TrainsBaseWeights, self.trunk).get_trainable_steps(name)


def add_classifier_head(
    trunk: Adapter,
    head: ClassifierHead,
    *,
    seed: int,
    arithmetic: torch.dtype,
    discriminator: DiscriminatorSize | None = None,
) -> HeadedAdapter:
    """Return ``trunk`` combined with ``head``.

    Args:
        seed: ``train.seed``.
        arithmetic: type in which adapters, and so the head, compute.
        discriminator: of domain-adversarial training; None: there is none.
    """
    kind = HeadedBaseWeights if isinstance(trunk, TrainsBaseWeights) else HeadedAdapter
    return kind(trunk, head, seed=seed, arithmetic=arithmetic, discriminator=discriminator)


def choose_discriminator_size(config: RunConfig) -> DiscriminatorSize | None:
    """Return the size of a run's discriminator; None where it trains none."""
    section = config.train.domain_adversarial
    if section is None:
        return None
    domains = {source.domain for source in config.data.train if source.domain is not None}
    return DiscriminatorSize(section.hidden_size, len(domains))
