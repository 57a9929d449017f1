"""The objective of domain-adversarial training: classes of labelled rows, domains of all.

::

    loss of a step = 1/C sum of class losses  +  1/D sum of domain losses

``C`` labelled rows and ``D`` rows with a domain, over all ranks and micro-batches. The gradient of
the second term is reversed where it enters the pooled state, with the factor of Ganin et al. 2016,
section 5.2.2, of progress ``p = step / steps``::

    strength(p) = weight (2 / (1 + exp(-gamma p)) - 1)

so it is a function of the step alone, and a resumed run continues with it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.adapters.classifier_head.discriminator import DomainDiscriminator
from dist_peft.core.config.run import DomainAdversarialConfig
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.labels import ClassTask
from dist_peft.train.objective import ClassificationObjective

__all__ = ["DomainObjective", "compute_reversal_strength", "find_discriminator"]


def compute_reversal_strength(config: DomainAdversarialConfig, step: int, steps: int) -> float:
    """Return the factor of the reversed gradient in step ``step`` (from 0) of ``steps``."""
    return config.weight * (2 / (1 + math.exp(-config.gamma * step / max(1, steps))) - 1)


def find_discriminator(model: nn.Module) -> DomainDiscriminator:
    """Return the discriminator of a model that has one."""
    return next(m for m in model.modules() if isinstance(m, DomainDiscriminator))


class DomainObjective(ClassificationObjective):
    """``ClassificationObjective`` with the loss of domains in training.

    Args:
        tasks: tasks of the labelled training sources.
        config: the section ``train.domain_adversarial``.

    Attributes:
        steps: of the whole run.
    """

    def __init__(
        self, tasks: Sequence[ClassTask], config: DomainAdversarialConfig, steps: int = 1
    ) -> None:
        super().__init__(tasks)
        self.config, self.steps = config, steps
        self._share = 0.0
        self._strength = 0.0
        self._sums: list[Tensor] = []

    def begin_run(self, total_steps: int) -> None:
        """Tell the number of steps, which the schedule depends on."""
        self.steps = total_steps

    def begin_step(
        self, step: int, batches: Sequence[LabelledBatch], targets: int, world: World
    ) -> None:
        """Count the rows with a domain over all ranks. Collective.

        Args:
            step: number of steps done before.
            targets: labelled rows of the step, over all ranks.
        """
        own = sum(int((_get_domains(batch) >= 0).sum()) for batch in batches)
        (rows,) = world.sum_over_ranks(own)
        self._share = targets / max(1.0, rows)
        self._strength = compute_reversal_strength(self.config, step, self.steps)
        self._sums = []

    def compute_loss(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device, call: nn.Module
    ) -> Tensor:
        """Return the sum of class losses and, weighted so that the division by the step's targets
        makes it a mean over the rows with a domain, that of domain losses."""
        discriminator = find_discriminator(model)
        discriminator.strength = self._strength
        discriminator.last_tokens = batch.attention_mask.sum(1) - 1
        classes = super().compute_loss(model, batch, device, call)
        logits, discriminator.logits = discriminator.logits, None
        discriminator.last_tokens = None  # those of this batch: evaluation has others
        assert logits is not None
        domains = _get_domains(batch).to(logits.device)
        loss = functional.cross_entropy(logits, domains, ignore_index=-1, reduction="sum")
        hits = (logits.detach().argmax(1) == domains).sum()
        known = (domains >= 0).sum()
        self._sums.append(torch.stack([loss.detach().double(), hits.double(), known.double()]))
        return classes + loss * self._share

    def collect_metrics(self, world: World) -> dict[str, Any]:
        """Return the step's fields of ``StepMetrics``. Collective."""
        own = torch.stack(self._sums).sum(0).tolist()
        loss, hits, known = world.sum_over_ranks(*own)
        return {
            "domain_loss": loss / max(1.0, known),
            "domain_accuracy": hits / max(1.0, known),
            "reversal_strength": self._strength,
        }


def _get_domains(batch: LabelledBatch) -> Tensor:
    if batch.domains is None:
        return torch.full((len(batch.labels),), -1)
    return batch.domains
