"""Decoded weights that a block's recomputation leaves to its backward, by choice.

With activation checkpointing a frozen weight is decoded three times: in forward, in recomputation
and in backward. The last two are close together, a block at a time, so that one decode may serve
both::

                    forward      recomputation     backward
    not shared      decode       decode            decode
    shared          decode       decode, hold      take, free

    held: at most the decoded frozen weights of one block, 2 bytes a weight in 16 bits

The decode is the same function of the same bytes, so that results have the same bits. A weight is
held under its packed tensor: products that use it several times, such as DoRA's, share it too. It
is freed by the last backward that takes it. Where something else was recomputed in between, or the
recomputation ended before the product (as it does at a block's last linear), backward decodes.

The block that holds weights is one of the thread, as backward recomputes in a thread of its own.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "BlockDecodes",
    "get_block_decodes",
    "hold_decode",
    "make_sharing_contexts",
    "take_decode",
]


@dataclass
class _Held:
    """A decoded weight, its packed tensor (whose id is the key), and the backwards to come."""

    packed: Tensor
    weight: Tensor
    uses: int = 0


class BlockDecodes:
    """Decoded weights of one call of a block, from its recomputation to its backward."""

    def __init__(self) -> None:
        self.recomputes = False
        self._held: dict[Hashable, _Held] = {}

    def hold(self, packed: Tensor, key: Hashable, decode: Callable[[], Tensor]) -> Tensor:
        """Return the weight, which one backward more will take."""
        held = self._held.get((id(packed), key))
        if held is None:
            held = self._held[id(packed), key] = _Held(packed, decode())
        held.uses += 1
        return held.weight

    def take(self, packed: Tensor, key: Hashable) -> Tensor | None:
        """Return a weight that is held, and free it with its last use; None: it has to be decoded.

        Args:
            packed: the object that ``hold`` got.
            key: the type of the decoded weight, and which part of ``packed`` it is.
        """
        held = self._held.get((id(packed), key))
        if held is None:
            return None
        held.uses -= 1
        if not held.uses:
            del self._held[id(packed), key]
        return held.weight

    def free(self) -> None:
        self._held.clear()


class _ThreadState(threading.local):
    active: BlockDecodes | None = None
    holder: weakref.ref[BlockDecodes] | None = None


_state = _ThreadState()


def make_sharing_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts of one call of a block: for its forward pass, and for its recomputation."""
    decodes = BlockDecodes()
    return _Activation(decodes, False), _Activation(decodes, True)


class _Activation(AbstractContextManager[None]):
    """Make the decodes of a block the thread's; may be entered again."""

    def __init__(self, decodes: BlockDecodes, recomputes: bool) -> None:
        self._decodes, self._recomputes = decodes, recomputes
        self._outer: list[BlockDecodes | None] = []

    def __enter__(self) -> None:
        self._outer.append(_state.active)
        _state.active = self._decodes
        self._decodes.recomputes = self._recomputes
        if self._recomputes:
            before = None if _state.holder is None else _state.holder()
            if before is not None and before not in self._outer:
                before.free()  # a backward that did not take all of them
            _state.holder = weakref.ref(self._decodes)

    def __exit__(self, *error: object) -> None:
        _state.active = self._outer.pop()


def get_block_decodes() -> BlockDecodes | None:
    """Return the present block's decodes, for a node's backward; None: nothing is shared."""
    return _state.active


def hold_decode(
    packed: Tensor, key: Hashable, decode: Callable[[], Tensor], is_needed: bool
) -> Tensor:
    """Decode in forward; in recomputation hold the weight for backward.

    Args:
        packed: the packed weight, an object that stays the same.
        key: the type of the decoded weight, and which part of ``packed`` it is.
        decode: makes the weight, which nothing changes in place.
        is_needed: backward will decode too.
    """
    active = _state.active
    if active is None or not active.recomputes or not is_needed:
        return decode()
    return active.hold(packed, key, decode)


def take_decode(
    decodes: BlockDecodes | None, packed: Tensor, key: Hashable, decode: Callable[[], Tensor]
) -> Tensor:
    """Return in backward the weight that recomputation has held, or decode it.

    Args:
        decodes: of the node's block, by ``get_block_decodes`` in its forward.
        packed, key, decode: as of ``hold_decode``.
    """
    found = None if decodes is None else decodes.take(packed, key)
    return decode() if found is None else found
