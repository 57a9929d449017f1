"""A few prompts of the data, continued greedily: text to look at before and after training.

Prompts of one batch are padded on the right. A causal model does not see the padding, so neither
masks nor a key-value cache are needed, and whatever adapter, base or engine is trained computes it
by the same forward as in evaluation::

    forward 1    p0 p1 p2 p3 .  .      next token of row 0 from position 3
                 q0 q1 .  .  .  .                    row 1 from position 1
    forward 2    p0 p1 p2 p3 g0 .
                 q0 q1 h0 .  .  .

``max_new_tokens`` forwards, on sharded engines as many gathers of the base. Every rank computes the
same rows; the first rank's tokens are sent to the others, so that all stop together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_peft.core.progress_beat import mark_progress

__all__ = ["MAX_PROMPT_TOKENS", "SamplePrompt", "continue_greedily", "select_sample_prompts"]

MAX_PROMPT_TOKENS = 128
_SEARCHED_ROWS = 64
_TEXT_PROMPT_TOKENS = 32
_NO_TARGET = -100


class PromptRows(Protocol):
    """Sequences as tokens, labels (-100: no target) and positions (0 begins a document)."""

    def __len__(self) -> int: ...

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class SamplePrompt:
    """Tokens to continue, and those that follow in the data."""

    tokens: list[int]
    expected: list[int]


def select_sample_prompts(rows: PromptRows, count: int, longest: int) -> list[SamplePrompt]:
    """Return prompts of the first documents of evenly spread sequences.

    A prompt is everything before the first target; of a text, of which each token is a target, it
    is the first half, at most 32 tokens. Documents whose prompt fits into ``longest`` come first;
    where there are too few, longer prompts lose their beginning.

    Args:
        rows: up to 64 sequences are searched.
        count: number of prompts, at most.
        longest: tokens of a prompt, at most; at least 1.
    """
    found = []
    places = torch.linspace(0, len(rows) - 1, min(_SEARCHED_ROWS, len(rows))).long().unique()
    for index in places.tolist():
        prompt = _cut_first_document(*rows.get_sequence(index))
        if prompt is not None:
            found.append(prompt)
        if sum(len(each.tokens) <= longest for each in found) == count:
            break
    found.sort(key=lambda each: len(each.tokens) > longest)  # stable
    return [SamplePrompt(each.tokens[-longest:], each.expected) for each in found[:count]]


def _cut_first_document(tokens: Tensor, labels: Tensor, positions: Tensor) -> SamplePrompt | None:
    begins = (positions == 0).nonzero().flatten().tolist()
    stop = begins[1] if len(begins) > 1 else len(tokens)
    targets = (labels[:stop] != _NO_TARGET).nonzero().flatten().tolist()
    if not targets:
        return None
    first = targets[0]  # labels[first] follows tokens[first]
    if first == 0:
        cut = min(_TEXT_PROMPT_TOKENS, max(1, len(targets) // 2))
        return SamplePrompt(tokens[:cut].tolist(), labels[cut - 1 : targets[-1] + 1].tolist())
    run = next((n for n, place in enumerate(targets) if place != first + n), len(targets))
    return SamplePrompt(tokens[: first + 1].tolist(), labels[first : first + run].tolist())


@torch.no_grad()
def continue_greedily(
    model: nn.Module,
    prompts: Sequence[SamplePrompt],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    device: torch.device,
    share: Callable[[Tensor], None],
) -> list[list[int]]:
    """Return the most likely next tokens of each prompt, the end token included. Collective.

    Args:
        model: in evaluation mode; returns ``logits`` ``[B, S, V]``.
        prompts: a batch.
        stop_ids: tokens that end a row.
        pad_id: any token with an embedding.
        share: replaces ids, int64 ``[B]`` on the CPU, by those of the first rank, in place.
    """
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max()) + max_new_tokens), pad_id)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt.tokens)] = torch.tensor(prompt.tokens)
    made: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    numbers = torch.arange(len(prompts))
    for step in range(max_new_tokens):
        width = int(lengths.max()) + step
        output: Any = model(input_ids=ids[:, :width].to(device), use_cache=False)
        last = output.logits[numbers.to(device), (lengths + step - 1).to(device)]
        tokens = last.float().argmax(-1).cpu()
        share(tokens)
        mark_progress()
        ids[numbers, lengths + step] = tokens
        for row, token in enumerate(tokens.tolist()):
            if not ended[row]:
                made[row].append(token)
                ended[row] = token in stop_ids
        if all(ended):
            break
    return made
