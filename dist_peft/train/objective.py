"""Training objectives: how a batch is computed, its loss, and its scores in evaluation.

An objective is chosen once, together with the loaders (``app.data_setup``); the training loop,
evaluation and measurements call it and do not know the kind of a batch::

    batch  -- compute_loss -->            scalar, for backward
           -- compute_row_statistics -->  [B, 2 + K], summed over sequences and ranks by task
                                              columns 0, 1: loss, targets -> mean loss
                                              the other K -- compute_scores --> scores
           -- compute_logits -->          for measurements inside the model

===========================  =================  =======================  ======================
objective                    batch              targets of a sequence    K, scores
===========================  =================  =======================  ======================
``TokenObjective``           ``Batch``          its labelled tokens      0, none
``ClassificationObjective``  ``LabelledBatch``  its class, of ``C``      3 C, ``ClassScores``
===========================  =================  =======================  ======================
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dist_peft.core.device_copy import copy_to_device
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.labels import ClassTask
from dist_peft.data.loader import Batch
from dist_peft.model.attention_mask import build_model_inputs
from dist_peft.model.classifier import reads_token_types
from dist_peft.train.classification_metrics import (
    ClassScores,
    batch_class_losses,
    compute_class_scores,
    count_predictions,
)
from dist_peft.train.head_loss import (
    computes_losses_at_head,
    replace_logits_by_loss,
    replace_logits_by_losses,
)
from dist_peft.train.loss import IGNORE, sum_token_loss

__all__ = ["ClassificationObjective", "Objective", "TokenObjective"]

BatchT = TypeVar("BatchT", bound=Batch, contravariant=True)


class Objective(Protocol[BatchT]):
    """A training objective for one kind of batch.

    Attributes:
        target_unit: short name of a target, for the rate of the progress display.
        measured_tokens: name of the tokens that ``mark_measured_tokens`` selects.
    """

    target_unit: str
    measured_tokens: str

    def begin_run(self, total_steps: int) -> None:
        """Tell the number of steps of the run, before its first one in this process."""
        ...

    def begin_step(self, step: int, batches: Sequence[BatchT], targets: int, world: World) -> None:
        """Begin the micro-batches of a step; may be collective.

        Args:
            step: number of steps done before.
            targets: of the step, over all ranks; at least 1.
        """
        ...

    def collect_metrics(self, world: World) -> dict[str, Any]:
        """Return further fields of ``StepMetrics`` of the step begun last; may be collective."""
        ...

    def compute_logits(
        self, model: nn.Module, batch: BatchT, device: torch.device, call: nn.Module | None = None
    ) -> Tensor:
        """Return the logits of a batch, ``[B, ...]`` on ``device``; packed documents are isolated.

        Args:
            call: module to call instead of ``model`` (an engine's wrapper of it).
        """
        ...

    def compute_loss(
        self, model: nn.Module, batch: BatchT, device: torch.device, call: nn.Module
    ) -> Tensor:
        """Return the sum of the losses of all targets in nats: a scalar with a gradient."""
        ...

    def compute_row_statistics(
        self, model: nn.Module, batch: BatchT, device: torch.device
    ) -> Tensor:
        """Return numbers of each sequence that are summed in evaluation, float64 ``[B, 2 + K]``.

        The summed loss of its targets in nats and their number come first; the other ``K`` are
        those of ``compute_scores``. On the CPU, 0 for a filler sequence.
        """
        ...

    def compute_scores(self, sums: Tensor, task: str | None = None) -> ClassScores | None:
        """Return the scores of sequences from the sum of their last ``K`` statistics, ``[K]``.

        Args:
            task: name of the sequences' task; None: those of all tasks.
        """
        ...

    def mark_measured_tokens(self, batch: BatchT) -> Tensor:
        """Return which tokens measurements inside the model count, bool ``[B, S]``."""
        ...


class _PlainSteps:
    """Hooks of objectives whose loss depends on a micro-batch alone."""

    def begin_run(self, total_steps: int) -> None:
        pass

    def begin_step(self, step: int, batches: Sequence[Any], targets: int, world: World) -> None:
        pass

    def collect_metrics(self, world: World) -> dict[str, Any]:
        return {}


class TokenObjective(_PlainSteps):
    """Cross entropy of next tokens. See ``Objective``."""

    target_unit = "tok"
    measured_tokens = "target tokens"

    def compute_logits(
        self, model: nn.Module, batch: Batch, device: torch.device, call: nn.Module | None = None
    ) -> Tensor:
        return _call_model(call or model, self.build_inputs(model, batch, device))

    def build_inputs(self, model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return keyword arguments of the forward pass; documents of a sequence are isolated."""
        inputs = build_model_inputs(model, batch.input_ids, batch.position_ids, batch.is_packed)
        return {name: _move_to_device(value, device) for name, value in inputs.items()}

    def compute_loss(
        self, model: nn.Module, batch: Batch, device: torch.device, call: nn.Module
    ) -> Tensor:
        if computes_losses_at_head(model):
            with replace_logits_by_loss(model, batch.labels):
                return _call_model(call, self.build_inputs(model, batch, device))
        logits = self.compute_logits(model, batch, device, call)
        return sum_token_loss(logits, copy_to_device(batch.labels, device))

    def compute_share_losses(
        self,
        model: nn.Module,
        batch: Batch,
        device: torch.device,
        call: nn.Module,
        counts: Sequence[int],
    ) -> list[Tensor]:
        """Return ``compute_loss`` of each share of a batch, from one forward pass.

        Args:
            counts: sequences of each share, in the order of the batch.
        """
        labels = batch.labels.split(list(counts))
        if computes_losses_at_head(model):
            targets = [int((own != IGNORE).sum()) for own in labels]
            losses = self._compute_target_losses(model, batch, device, call).split(targets)
            return [own.sum() for own in losses]
        logits = self.compute_logits(model, batch, device, call).split(list(counts))
        pairs = zip(logits, labels, strict=True)
        return [sum_token_loss(own, wanted.to(device)) for own, wanted in pairs]

    def _compute_target_losses(
        self, model: nn.Module, batch: Batch, device: torch.device, call: nn.Module
    ) -> Tensor:
        """Return the loss of each target ``[N]``, computed in the head without whole logits."""
        with replace_logits_by_losses(model, batch.labels):
            return _call_model(call, self.build_inputs(model, batch, device))

    def compute_row_statistics(
        self, model: nn.Module, batch: Batch, device: torch.device
    ) -> Tensor:
        targets = batch.labels != IGNORE
        if computes_losses_at_head(model):
            losses = self._compute_target_losses(model, batch, device, model).double().cpu()
            rows = torch.zeros(len(targets), dtype=torch.float64)
            rows.index_add_(0, targets.nonzero()[:, 0], losses)
        else:
            logits, labels = (
                self.compute_logits(model, batch, device),
                copy_to_device(batch.labels, device),
            )
            sums = [
                sum_token_loss(logits[b : b + 1], labels[b : b + 1]) for b in range(len(labels))
            ]
            rows = torch.stack(sums).double().cpu()
        return torch.stack([rows, targets.sum(1).double()], 1)

    def compute_scores(self, sums: Tensor, task: str | None = None) -> None:
        """Return None: the mean loss is all that is reported."""

    def mark_measured_tokens(self, batch: Batch) -> Tensor:
        return batch.labels != IGNORE


class ClassificationObjective(_PlainSteps):
    """Cross entropy of each sequence's class among those of its task. See ``Objective``.

    Args:
        tasks: tasks of the training sources.
    """

    target_unit = "rows"
    measured_tokens = "tokens"

    def __init__(self, tasks: Sequence[ClassTask] = ()) -> None:
        self._tasks = {task.name: task for task in tasks}

    def compute_logits(
        self,
        model: nn.Module,
        batch: LabelledBatch,
        device: torch.device,
        call: nn.Module | None = None,
    ) -> Tensor:
        return _call_model(call or model, self.build_inputs(model, batch, device))

    def build_inputs(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device
    ) -> dict[str, Any]:
        """Return keyword arguments of the forward pass.

        A sequence is one padded document: it has a mask, and the model computes its own positions
        (RoBERTa's begin at 2).
        """
        inputs: dict[str, Any] = {
            "input_ids": copy_to_device(batch.input_ids, device),
            "attention_mask": copy_to_device(batch.attention_mask, device),
        }
        if reads_token_types(model):
            inputs["token_type_ids"] = copy_to_device(batch.token_types, device)
        return inputs

    def compute_loss(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device, call: nn.Module
    ) -> Tensor:
        return batch_class_losses(self.compute_logits(model, batch, device, call), batch).sum()

    def compute_row_statistics(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device
    ) -> Tensor:
        logits = self.compute_logits(model, batch, device)
        losses = batch_class_losses(logits, batch).double().cpu()
        targets = (batch.labels[:, 0] != IGNORE).double()
        counts = count_predictions(logits, batch).flatten(1)
        return torch.cat([losses[:, None], targets[:, None], counts], 1)

    def compute_scores(self, sums: Tensor, task: str | None = None) -> ClassScores:
        return compute_class_scores(sums.view(3, -1), self._find_positive_class(task))

    def _find_positive_class(self, task: str | None) -> int | None:
        """Return its class id; None if the task has none, or of several tasks none is meant."""
        found = self._tasks.get(task or "")
        if found is None and len(self._tasks) == 1:
            (found,) = self._tasks.values()  # held-out sources of other names belong to it
        return None if found is None else found.positive_class

    def mark_measured_tokens(self, batch: LabelledBatch) -> Tensor:
        return batch.attention_mask.bool()


def _move_to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _move_to_device(entry, device) for name, entry in value.items()}
    return copy_to_device(value, device)


def _call_model(call: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = call(**inputs, use_cache=False).logits
    return logits
