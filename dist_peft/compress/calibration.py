"""Run a model block by block on calibration samples.

A decoder layer takes hidden states and tensors that the model computes once a forward (rotary
angles, masks). One ordinary forward of the whole model records both; afterwards each block can be
called alone, with hidden states that changed because blocks before it did::

    model(ids)            records   block 0: h0, (angles, mask)    block 1: (angles, mask)   ...
    block 0(h0, ...)      as often as needed, then once more for h1
    block 1(h1, ...)      ...

Linears that read the same tensor (q, k and v; gate and up) form a *stage*: they share a Hessian.
Stages are in execution order: when one is solved, all before it have been.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.data.documents import SequenceSet
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = [
    "CalibrationSample",
    "CalibrationSize",
    "capture_block_inputs",
    "find_linear_stages",
    "make_calibration_sequences",
    "record_inputs",
]

log = logging.getLogger("dist_peft")

_USE_HQQ = "use base.quant.solver: hqq, which needs no calibration"


@dataclass(frozen=True)
class CalibrationSize:
    """Number of calibration sequences and of their tokens.

    ``option``: names the setting of either in messages, followed by ``samples`` or ``tokens``.
    """

    samples: int
    tokens: int
    option: str = "base.quant.calibration_"


def make_calibration_sequences(
    documents: SequenceSet, size: CalibrationSize, *, max_positions: int | None, seed: int
) -> Tensor:
    """Return token sequences of ``data.train``: long ``[samples, tokens]``.

    Documents are concatenated in an order drawn from ``seed`` and cut into full sequences.

    Args:
        documents: the calibration text, unpacked.
        size: number of sequences and of their tokens.
        max_positions: longest sequence that the base supports; None: no limit.

    Raises:
        UserError: less than one sequence of text.
    """
    tokens = min(size.tokens, max_positions or size.tokens)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    parts: list[Tensor] = []
    missing = size.samples * tokens
    for index in order.tolist():
        if missing <= 0:
            break
        parts.append(documents.get_sequence(index)[0])
        missing -= len(parts[-1])
    text = torch.cat(parts)
    count = min(len(text) // tokens, size.samples)
    if not count:
        raise UserError(
            f"data.train has {len(text)} tokens, less than a calibration sequence of {tokens}; "
            f"add text or lower {size.option}tokens"
        )
    if count < size.samples:
        log.warning(
            "data.train has text for %d calibration sequences of %d tokens, not for %d (%ssamples)",
            count,
            tokens,
            size.samples,
            size.option,
            extra=ONCE,
        )
    return text[: count * tokens].long().view(count, tokens)


@dataclass
class CalibrationSample:
    """A calibration sequence as it passes through the blocks.

    Attributes:
        hidden: input of the block to come, ``[1, tokens, hidden]``.
        block_inputs: further positional and keyword arguments of each block.
    """

    hidden: Tensor
    block_inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def run_block(self, block: nn.Module, number: int) -> Tensor:
        """Return the output of ``block``, the one with this number."""
        args, kwargs = self.block_inputs[number]
        output = block(self.hidden, *args, **kwargs)
        found = output if isinstance(output, Tensor) else output[0]
        assert isinstance(found, Tensor) and found.shape == self.hidden.shape
        return found


@torch.no_grad()
def capture_block_inputs(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ids: Tensor,
    like: CalibrationSample | None = None,
    advice: str = _USE_HQQ,
) -> CalibrationSample:
    """Run the whole model once and record the inputs of its blocks.

    Args:
        ids: long ``[1, tokens]``.
        like: an earlier sample of as many tokens; equal tensors are shared with it.
        advice: the fix in the message of an error.

    Raises:
        UserError: a block's first argument is not the hidden states.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record_block_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    hooks = [b.register_forward_pre_hook(record_block_call, with_kwargs=True) for b in blocks]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    in_turn = len(calls) == len(blocks)
    if not in_turn or not all(args and isinstance(args[0], Tensor) for args, _ in calls):
        raise UserError(
            f"{type(model).__name__} does not call its blocks one after the other with hidden "
            f"states first; {advice}"
        )
    block_inputs = [(args[1:], kwargs) for args, kwargs in calls]
    if like is not None:
        block_inputs = _share_equal_tensors(block_inputs, like.block_inputs)
    return CalibrationSample(calls[0][0][0], block_inputs)


def _share_equal_tensors(value: Any, like: Any) -> Any:
    """Return ``value`` with the tensors of ``like`` where they are equal."""
    if isinstance(value, Tensor):
        same = isinstance(like, Tensor) and value.shape == like.shape and torch.equal(value, like)
        return like if same else value
    if isinstance(value, tuple | list) and isinstance(like, tuple | list):
        return type(value)(_share_equal_tensors(v, w) for v, w in zip(value, like, strict=True))
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: _share_equal_tensors(item, like.get(key)) for key, item in value.items()}
    return value


@torch.no_grad()
def find_linear_stages(
    block: nn.Module, run: Callable[[], Any], advice: str = _USE_HQQ
) -> list[list[FrozenLinear]]:
    """Return the linears of a block grouped by input, in the order of their first use.

    Args:
        run: calls the block.
        advice: the fix in the message of an error.

    Raises:
        UserError: a linear was never called, so it has no calibration input.
    """
    linears = [module for module in block.modules() if isinstance(module, FrozenLinear)]
    stages: dict[int, list[FrozenLinear]] = {}
    inputs: list[Tensor] = []  # keep references: a freed tensor's id could be reused
    seen: set[int] = set()

    def record_linear_call(linear: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(linear, FrozenLinear)
        if id(linear) not in seen:
            seen.add(id(linear))
            inputs.append(args[0])
            stages.setdefault(id(args[0]), []).append(linear)

    hooks = [linear.register_forward_pre_hook(record_linear_call) for linear in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    idle = [linear.source for linear in linears if id(linear) not in seen]
    if idle:
        raise UserError(f"calibration never reached {idle[0]}; {advice}")
    return list(stages.values())


@contextmanager
def record_inputs(linear: nn.Module) -> Iterator[list[Tensor]]:
    """Append every input of ``linear`` to the yielded list."""
    inputs: list[Tensor] = []

    def append_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach())

    hook = linear.register_forward_pre_hook(append_input)
    try:
        yield inputs
    finally:
        hook.remove()
