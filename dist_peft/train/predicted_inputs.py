"""Scheduled sampling: inputs of a completion are replaced by the model's own predictions.

Teacher forcing trains every prediction on gold tokens; a model that writes by itself reads its own
(Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks").
A transformer computes all positions at once, so there are two passes (Mihaylova and Martins 2019,
"Scheduled Sampling for Transformers")::

    gold inputs x      <s>  the  cat  sat   on   .        the is a prompt's last token
    pass 1, no gradient          dog  sat   on   the  .   prediction of each next token
    kept with eps      <s>  the  dog  sat   on   .        pass 2: loss of the gold targets

Replaced is an input that is a target itself and that a later target of its document depends on:
never a prompt, a document's first token, or its last. The predictions are those of the model as it
is used, without dropout. Only the positions whose prediction is wanted go through the output head.

Whether and by what a token is replaced depends on two uniform numbers of (run seed, step, document,
position), so not on ranks, micro-batches or the other documents of a row. A document is identified
by its tokens: of two equal ones in a step, equal positions are replaced.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dist_peft.core.config.run import ScheduledSamplingConfig
from dist_peft.core.seeds import derive_seed
from dist_peft.data.loader import Batch
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.head_loss import (
    computes_losses_at_head,
    iterate_frozen_head_logits,
    replace_head_output,
)
from dist_peft.train.loss import IGNORE
from dist_peft.train.objective import TokenObjective

__all__ = [
    "ScheduledSampling",
    "choose_tokens",
    "compute_gold_probability",
    "draw_document_uniforms",
    "find_replaceable_inputs",
    "predict_next_tokens",
]

_DRAWN_ELEMENTS = 2**22
"""Probabilities in float64 at a time, where tokens are drawn: 32 MiB."""


def compute_gold_probability(config: ScheduledSamplingConfig, step: int) -> float:
    """Return eps, the probability to keep a gold input, of step ``step`` (from 0): Bengio et al.
    2015, section 2.4."""
    k = config.resolved_k
    if config.schedule == "linear":
        eps = k - (config.c or 0.0) * step
    elif config.schedule == "exponential":
        eps = k**step
    else:  # k / (k + exp(step / k)), without overflow
        falling = math.exp(-step / k)
        eps = k * falling / (k * falling + 1)
    return max(config.eps_min, eps)


@dataclass
class ScheduledSampling:
    """Mixes the inputs of a run's micro-batches.

    Attributes:
        seed: ``train.seed``.
        eps: of the step begun last.
        counts: inputs replaced and replaceable, of this rank's micro-batches of that step; where
            eps is 1 none are counted.
    """

    config: ScheduledSamplingConfig
    seed: int
    step: int = 0
    eps: float = 1.0
    counts: list[int] = field(default_factory=lambda: [0, 0])

    @classmethod
    def from_config(
        cls, config: ScheduledSamplingConfig | None, seed: int
    ) -> "ScheduledSampling | None":
        return None if config is None else cls(config, seed)

    def begin_step(self, step: int) -> None:
        """The next micro-batches are of optimizer step ``step`` (from 0)."""
        self.step, self.eps = step, compute_gold_probability(self.config, step)
        self.counts = [0, 0]

    def mix_inputs(
        self, model: nn.Module, objective: TokenObjective, batch: Batch, device: torch.device
    ) -> Batch:
        """Return ``batch`` with some inputs replaced; the same object while eps is 1.

        Every rank must call it for each of its micro-batches, those without sequences too: the
        forward pass gathers shards.
        """
        if self.eps >= 1:
            return batch
        inputs = find_replaceable_inputs(batch)
        uniforms = draw_document_uniforms(self.seed, self.step, batch, inputs)
        places = (inputs & (uniforms[..., 0] >= self.eps)).nonzero()
        rows, columns = places.unbind(1)
        tokens = predict_next_tokens(
            model,
            objective,
            batch,
            device,
            places - torch.tensor([0, 1]),
            uniforms[rows, columns, 1],
            self.config.temperature,
        )
        mixed = batch.input_ids.clone()
        mixed[rows, columns] = tokens.cpu()
        self.counts[0] += len(places)
        self.counts[1] += int(inputs.sum())
        return replace(batch, input_ids=mixed)


def find_replaceable_inputs(batch: Batch) -> Tensor:
    """Return which inputs may be replaced, bool ``[B, S]``: targets that a later one depends on."""
    is_target = batch.labels != IGNORE  # of the next token
    inputs = torch.zeros_like(is_target)
    inputs[:, 1:] = is_target[:, :-1] & (batch.position_ids[:, 1:] > 0)
    document = (batch.position_ids == 0).cumsum(1)
    columns = torch.arange(inputs.shape[1]).expand_as(document)
    last = torch.full((len(document), int(document.max()) + 1), -1)
    last.scatter_reduce_(1, document, columns.masked_fill(~is_target, -1), "amax")
    return inputs & (columns <= last.gather(1, document))


def draw_document_uniforms(seed: int, step: int, batch: Batch, inputs: Tensor) -> Tensor:
    """Return two numbers in [0, 1) for each input, float64 ``[B, S, 2]``.

    Args:
        inputs: bool ``[B, S]``; documents without any get zeros.
    """
    uniforms = torch.zeros(*inputs.shape, 2, dtype=torch.float64)
    for row, span in _iterate_documents(batch.position_ids):
        if not inputs[row, span].any():
            continue
        tokens = batch.input_ids[row, span].contiguous()
        document = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        generator = torch.Generator()
        generator.manual_seed(derive_seed(seed, "scheduled sampling", step, document))
        uniforms[row, span] = torch.rand(len(tokens), 2, dtype=torch.float64, generator=generator)
    return uniforms


def _iterate_documents(position_ids: Tensor) -> Iterator[tuple[int, slice]]:
    width = position_ids.shape[1]
    for row, positions in enumerate(position_ids):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], width], strict=True):
            yield row, slice(start, stop)


def predict_next_tokens(
    model: nn.Module,
    objective: TokenObjective,
    batch: Batch,
    device: torch.device,
    places: Tensor,
    uniforms: Tensor,
    temperature: float,
) -> Tensor:
    """Return the token that ``model`` predicts after each place, int64 ``[N]``.

    Where losses are computed in the head, so are predictions, a chunk of places at a time. Else
    there are whole logits ``[B, S, V]``, as for the loss.

    Args:
        places: int64 ``[N, 2]``: rows and columns of ``batch``; there may be none.
        uniforms: float64 ``[N]`` in [0, 1).
        temperature: see ``choose_tokens``.
    """
    chosen = torch.zeros(len(places), dtype=torch.long)

    def choose_at_head(hidden: Tensor, head: nn.Module) -> Tensor:
        for part, logits in iterate_frozen_head_logits(hidden, head):
            chosen[part] = choose_tokens(logits, uniforms[part], temperature).to(chosen)
        return hidden  # the model's logits, which nothing reads

    with inference_mode(model):
        if computes_losses_at_head(model):
            with replace_head_output(model, places, choose_at_head):
                objective.compute_logits(model, batch, device)
        else:
            logits = objective.compute_logits(model, batch, device)
            rows, columns = places.to(logits.device).unbind(1)
            chosen = choose_tokens(logits[rows, columns], uniforms, temperature)
    return chosen


def choose_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Return a token of each row, int64 ``[N]``.

    Args:
        logits: ``[N, V]``.
        uniforms: float64 ``[N]`` in [0, 1), on the CPU.
        temperature: 0: the most probable token. Above: the first token at which the sum of
            ``softmax(logits / temperature)`` is above the row's uniform number.
    """
    if temperature == 0:
        return logits.argmax(1)
    size = max(1, _DRAWN_ELEMENTS // logits.shape[1])
    parts = zip(logits.split(size), uniforms.to(logits.device).split(size), strict=True)
    found = [_draw_tokens(rows, numbers, temperature) for rows, numbers in parts]
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.long)


def _draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    sums = torch.softmax(logits.double() / temperature, 1).cumsum_(1)
    found = torch.searchsorted(sums, (uniforms * sums[:, -1])[:, None], right=True)
    return found[:, 0].clamp_(max=logits.shape[1] - 1)  # NaN finds none
