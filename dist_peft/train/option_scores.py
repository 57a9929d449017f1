"""Multiple-choice evaluation by likelihood: the most probable choice is the answer.

For a question with prompt ``p`` and choices ``c_1 ... c_n``::

    score_i = log P(c_i | p) = sum over the tokens of c_i        chosen: argmax of the scores

Long answers have small probabilities. So a second accuracy divides each score by
the number of characters of the choice, as the common harnesses' ``acc_norm`` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader
from dist_peft.data.multiple_choice import ChoiceQuestion
from dist_peft.engine import Engine
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.objective import TokenObjective

__all__ = ["ChoiceResult", "evaluate_choices"]


@dataclass(frozen=True)
class ChoiceResult:
    """Shares of questions answered right; ``accuracy_norm``: by score per character."""

    questions: int
    accuracy: float
    accuracy_norm: float


def evaluate_choices(
    model: nn.Module,
    engine: Engine,
    questions: Sequence[ChoiceQuestion],
    loader: Loader[Batch],
    world: World,
) -> ChoiceResult:
    """Score every choice; each rank computes its share of the sequences.

    Args:
        loader: of the questions' ``ChoiceSequences``.
    """
    scores = _score_sequences(model, engine, loader, world)
    right = right_norm = start = 0
    for question in questions:
        own = scores[start : start + len(question.choices)]
        lengths = torch.tensor([len(choice.strip()) or 1 for choice in question.choices])
        right += int(own.argmax()) == question.answer
        right_norm += int((own / lengths).argmax()) == question.answer
        start += len(question.choices)
    return ChoiceResult(len(questions), right / len(questions), right_norm / len(questions))


def _score_sequences(
    model: nn.Module, engine: Engine, loader: Loader[Batch], world: World
) -> Tensor:
    """Return the log-likelihood of each sequence's targets in nats, float64 ``[sequences]``."""
    objective, scores = TokenObjective(), torch.zeros(len(loader.rows), dtype=torch.float64)
    with inference_mode(model):
        for batch in loader.load_all_sequential():
            world.raise_if_stop_requested()
            losses = objective.compute_row_statistics(model, batch, engine.device)[:, 0]
            for b, sample in enumerate(batch.sample_ids.tolist()):
                if sample >= 0:
                    scores[sample] = -losses[b]
    return torch.tensor(world.sum_over_ranks(*scores.tolist()), dtype=torch.float64)
