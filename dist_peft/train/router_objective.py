"""Next tokens with the load-balancing loss of trained routers.

As in ``transformers`` with ``output_router_logits``, a micro-batch's loss is ``CE + weight * aux``,
where ``aux`` is computed over all layers and the micro-batch's tokens without padding, which here
is a document without targets (``adapters.classifier_head.router``). Losses of micro-batches are
added up by their targets, as everywhere: ``aux`` counts for each target. So the sum does not depend
on the number of ranks, as micro-batches do not.

Evaluation reports the cross entropy alone.
"""

import torch
from torch import Tensor, nn

from dist_peft.adapters.classifier_head.router import RouterLoss, RouterPart
from dist_peft.core.device_copy import copy_to_device
from dist_peft.data.loader import Batch
from dist_peft.train.loss import IGNORE
from dist_peft.train.objective import TokenObjective

__all__ = ["RouterObjective", "mark_real_tokens"]


class RouterObjective(TokenObjective):
    """Cross entropy of next tokens and the routers' auxiliary loss. See ``Objective``."""

    _found: RouterLoss | None = None

    def compute_loss(
        self, model: nn.Module, batch: Batch, device: torch.device, call: nn.Module
    ) -> Tensor:
        loss = self._find_loss(model)
        if not loss.weight:
            return super().compute_loss(model, batch, device, call)
        loss.logits = []
        try:
            total = super().compute_loss(model, batch, device, call)
            logits = loss.logits
        finally:
            loss.logits = None  # recomputation computes them again
        targets = int((batch.labels != IGNORE).sum())
        if not targets:  # a filler sequence
            return total
        mask = copy_to_device(mark_real_tokens(batch), device)
        return total + targets * loss.weight * loss.compute(logits, mask).to(total.dtype)

    def _find_loss(self, model: nn.Module) -> RouterLoss:
        if self._found is None:
            self._found = next(m.loss for m in model.modules() if isinstance(m, RouterPart))
        return self._found


def mark_real_tokens(batch: Batch) -> Tensor:
    """Return 1 for tokens of documents that have a target, 0 for others and padding, long
    ``[B, S]``."""
    starts = batch.position_ids == 0
    starts[:, 0] = True
    places = starts.cumsum(1) - 1
    targets = (batch.labels != IGNORE).long()
    per_document = torch.zeros_like(places).scatter_add_(1, places, targets)
    return (per_document.gather(1, places) > 0).long()
