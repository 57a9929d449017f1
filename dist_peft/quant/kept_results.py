"""Results that recomputation takes from the first forward pass, by choice.

Activation checkpointing computes a block twice. Some results cost much and take little memory, so
that a block may keep them next to its input (selective recomputation, Korthikanti et al. 2022)::

    kind        result                             numbers a token     not done again
    attention   attention, and its normalizers     heads * D + heads   the scores, their product
    inner       s A x of low-rank factors          r a linear          a product, reading x
    product     W x of a frozen weight             out a linear        decode and product

Norms, activation functions, rotations and sums are computed again. Here a result is a tensor that a
function below autograd has made: the autograd node is the same in both passes, so that gradients
have the same bits.

In the first pass each such function appends its result to the block's list, in the order of the
calls; recomputation takes them in this order. A result that was changed in place since, or is not
there, is computed. The last result of a block is dropped at once where it is a product:
recomputation stops before it, at the last tensor that backward needs.

The active list is one of the thread, as backward recomputes in a thread of its own.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "KEPT_KINDS",
    "keep_attention_results",
    "keep_result",
    "keeps_results",
    "make_keeping_contexts",
]

ResultT = TypeVar("ResultT")

KEPT_KINDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "attention": ("attention", "inner"),
    "products": ("attention", "inner", "product"),
}
"""Value of ``engine.keep_results`` -> kinds of results that are kept."""

_ATTENTION_OPERATORS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
"""Operators of attention that a GPU or CPU runs as one kernel."""


class _Kept(NamedTuple):
    """A result, and the versions of its tensors when it was made."""

    kind: str
    value: Any
    versions: tuple[int, ...]


class _KeptResults:
    """Results of one call of a block.

    Attributes:
        kinds: that are kept.
        position: of the next result, while they are used; None while they are made.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        self.kinds = frozenset(kinds)
        self.position: int | None = None
        self._kept: list[_Kept | None] = []

    def append_result(self, kind: str, value: Any) -> None:
        alias = tree_map_only(Tensor, Tensor.detach, value)
        self._kept.append(_Kept(kind, alias, _list_versions(alias)))

    def take_result(self) -> _Kept | None:
        """Return the next result and forget it; None: it has to be computed."""
        assert self.position is not None
        place, self.position = self.position, self.position + 1
        if place >= len(self._kept):
            return None
        found, self._kept[place] = self._kept[place], None
        return found if found and _list_versions(found.value) == found.versions else None

    def drop_last_product(self) -> None:
        if self._kept and self._kept[-1] is not None and self._kept[-1].kind == "product":
            self._kept.pop()


class _ThreadState(threading.local):
    active: _KeptResults | None = None


_state = _ThreadState()


def make_keeping_contexts(
    kinds: Collection[str],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts of one call of a block: for its forward pass, and for its recomputation.

    Args:
        kinds: of ``KEPT_KINDS``.
    """
    results = _KeptResults(kinds)
    return _Activation(results, None), _Activation(results, 0)


class _Activation(AbstractContextManager[None]):
    """Make a list of results the thread's; may be entered again."""

    def __init__(self, results: _KeptResults, position: int | None) -> None:
        self._results, self._position = results, position
        self._outer: list[_KeptResults | None] = []

    def __enter__(self) -> None:
        self._outer.append(_state.active)
        self._results.position = self._position
        _state.active = self._results

    def __exit__(self, *error: object) -> None:
        if self._position is None:
            self._results.drop_last_product()
        _state.active = self._outer.pop()


def keeps_results(kind: str) -> bool:
    """Return whether the present block keeps results of ``kind``."""
    return _state.active is not None and kind in _state.active.kinds


def keep_result(kind: str, compute: Callable[[], ResultT]) -> ResultT:
    """Return ``compute()``, or in recomputation the result of the first pass.

    Call it where autograd does not record, such as in the forward of an autograd function.

    Args:
        kind: of ``KEPT_KINDS``.
        compute: makes the result, a tensor or a tuple; it keeps no results itself.
    """
    active = _state.active
    if active is None or kind not in active.kinds:
        return compute()
    if active.position is None:
        result = compute()
        active.append_result(kind, result)
        return result
    kept = active.take_result()
    if kept is None:
        return compute()
    value: ResultT = tree_map_only(Tensor, Tensor.detach, kept.value)
    return value


@contextmanager
def keep_attention_results() -> Iterator[None]:
    """Within the context, results of torch's fused attention operators are kept."""
    active = _state.active
    if active is None or "attention" not in active.kinds:
        yield
        return
    with _AttentionMode():
        yield


class _AttentionMode(TorchDispatchMode):
    """Sees operators below autograd, whose nodes are made as without it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name().partition(".")[0] not in _ATTENTION_OPERATORS:
            return func(*args, **(kwargs or {}))
        return keep_result("attention", lambda: func(*args, **(kwargs or {})))


def _list_versions(value: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
