"""Whether ranks that hold copies of the same tensors still hold the same bytes.

Compared tensors, in a run of four ranks that are sharded in two groups (HSDP)::

    rank 0   buffers, whole parameters | rows of shard 0      equal on all ranks | equal on 0 and 2
    rank 1   buffers, whole parameters | rows of shard 1                         | equal on 1 and 3
    rank 2   ...                       | rows of shard 0

Each rank sends three numbers: a hash of the whole tensors, the name of its shard, a hash of its
rows. A shard that no other rank holds has nothing to be compared with, and is not hashed. Copies
drift apart by a damaged memory or link, by ranks that compute other things, or by an error of an
engine.
"""

import logging
import time
from collections.abc import Iterator, Mapping

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from dist_peft.core.agreement import format_ranks, hash_json_value
from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.span import Span, row_span
from dist_peft.core.world import RemoteError, World
from dist_peft.engine.engine_protocol import Engine

__all__ = ["ReplicaCheck"]

log = logging.getLogger("dist_peft")

_CHUNK = 16 * 2**20
"""Elements brought to the CPU at a time."""


class ReplicaCheck:
    """Compares the copies of a model's tensors over all ranks; without other ranks it does nothing.

    Attributes:
        seconds: spent in checks so far. bytes_hashed: by this rank in the last check.
    """

    def __init__(self, model: nn.Module, engine: Engine, world: World) -> None:
        self._model, self._engine, self._world = model, engine, world
        self.seconds = 0.0
        self.bytes_hashed = 0

    def compare_replicas(self, facts: Mapping[str, object], *, everything: bool = False) -> None:
        """Compare trainable parameters, persistent buffers and ``facts``; a collective.

        Args:
            facts: other values that must be equal, such as step and learning rate: plain JSON.
            everything: also the frozen parameters, and the buffers that no file holds, which some
                models change with the lengths they see.

        Raises:
            RemoteError: on every rank: copies differ; names the tensor or fact and the ranks.
        """
        if self._world.size == 1:
            return
        start = time.perf_counter()
        self.bytes_hashed = 0
        whole, rows = dict[str, Tensor](), dict[str, tuple[Span, Tensor]]()
        for name, tensor, span, is_sharded in self._iterate_checked_tensors(everything):
            if is_sharded:
                rows[name] = (span, tensor)
            else:
                whole[name] = tensor
        shard = _hash_to_int64([[name, span.start, span.stop] for name, (span, _) in rows.items()])
        common = {f"{n}": self._hash_tensor(t) for n, t in whole.items()}
        common |= {key: _hash_to_int64(value) for key, value in facts.items()}
        holders = [r for r, (s,) in enumerate(self._world.gather_integers([shard])) if s == shard]
        shared = bool(rows) and len(holders) > 1
        own = (
            {n: self._hash_tensor(_to_local_tensor(t)) for n, (_, t) in rows.items()}
            if shared
            else {}
        )
        sums = [_hash_to_int64(common), shard, _hash_to_int64(own) if shared else 0]
        everyone = self._world.gather_integers(sums)
        equal = len({c for c, _, _ in everyone}) == 1 and len({(s, h) for _, s, h in everyone}) == (
            len({s for _, s, _ in everyone})
        )
        self.seconds += time.perf_counter() - start
        if not equal:
            self._explain_difference(common, shard, own)

    def _iterate_checked_tensors(
        self, everything: bool
    ) -> Iterator[tuple[str, Tensor, Span, bool]]:
        """Name, tensor (a DTensor, or this rank's own part), this rank's rows of it, or columns
        where it is sharded along these, and whether ranks hold different parts."""
        for name, parameter in self._model.named_parameters():
            if not (everything or parameter.requires_grad) or not parameter.dim():
                continue
            if hasattr(parameter, "ds_id"):
                continue  # ZeRO 3 spreads a trainable parameter over all ranks: no copies
            if parameter.is_meta:
                continue  # not loaded
            span = self._find_local_span(parameter)
            own = self._engine.get_local_bytes(parameter)
            if own is not None:
                yield name, own, span, True
            else:
                yield name, parameter, span, _is_row_sharded(parameter)
        for name, buffer in _iterate_buffers(self._model, everything):
            yield name, buffer, Span(0, buffer.shape[0] if buffer.dim() else 1), False

    def _find_local_span(self, parameter: Tensor) -> Span:
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard) and placement.dim:
                    mesh = parameter.device_mesh
                    return row_span(
                        parameter.shape[placement.dim], mesh.size(axis), mesh.get_local_rank(axis)
                    )
        return self._engine.local_row_span(parameter)

    def _hash_tensor(self, tensor: Tensor) -> int:
        flat = _to_local_tensor(tensor).detach().contiguous().flatten()
        digest = xxhash.xxh3_64()
        for part in flat.split(_CHUNK) if flat.numel() else ():
            mark_progress()
            # a copy: memory that numpy has seen cannot be resized, which FSDP2 does
            digest.update(part.to("cpu", copy=True).view(torch.uint8).numpy())
        self.bytes_hashed += flat.numel() * flat.element_size()
        return _to_signed_int64(digest.intdigest())

    def _explain_difference(
        self, common: Mapping[str, int], shard: int, own: Mapping[str, int]
    ) -> None:
        """Find the first name that differs; every rank of equal names comes here."""
        # without a shared list of names, ranks compare them one by one under equal positions
        sizes = self._world.gather_integers([_hash_to_int64(list(common)), len(common), len(own)])
        if len({s[0] for s in sizes}) > 1:
            raise RemoteError("ranks hold other tensors than each other: " + _find_odd_ranks(sizes))
        table = self._world.gather_integers(list(common.values()))
        for index, name in enumerate(common):
            column = [row[index] for row in table]
            if len(set(column)) > 1:
                raise RemoteError(_format_difference(name, column))
        most = max(s[2] for s in sizes)
        padded = [*own.values(), *([0] * (most - len(own)))]
        table = self._world.gather_integers([shard, *padded])
        for r, row in enumerate(table):
            first = next(i for i, other in enumerate(table) if other[0] == row[0])
            if row != table[first]:
                at = next(
                    i for i, (a, b) in enumerate(zip(row, table[first], strict=True)) if a != b
                )
                name = list(own)[at - 1] if len(own) >= at else f"number {at} of their shard"
                raise RemoteError(
                    f"{format_ranks([first, r])} hold the same rows of {name} with other values; "
                    + _ADVICE
                )
        raise RuntimeError("hashes differ but nothing that was hashed does")


_ADVICE = (
    "memory or a link may be damaged, or the ranks run different code. Resume from a checkpoint "
    "before this step, without the host that differs"
)


def _format_difference(name: str, column: list[int]) -> str:
    return f"ranks no longer agree on {name}: {_find_odd_ranks([[c] for c in column])}; {_ADVICE}"


def _find_odd_ranks(rows: list[list[int]]) -> str:
    """Which ranks have which value, the largest group first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, row in enumerate(rows):
        groups.setdefault(tuple(row), []).append(rank)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return " against ".join(format_ranks(group) for group in ordered)


def _is_row_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold different rows.

    The rows of this rank do not tell: of a matrix with fewer rows than ranks (the gate of a shared
    expert has one) a single rank may hold all of them.
    """
    return isinstance(tensor, DTensor) and any(
        placement.is_shard() and tensor.device_mesh.size(axis) > 1
        for axis, placement in enumerate(tensor.placements)
    )


def _to_local_tensor(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _iterate_buffers(model: nn.Module, everything: bool) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if everything or name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _hash_to_int64(value: object) -> int:
    """64 bits of a digest, signed."""
    return _to_signed_int64(int(hash_json_value(value)[:16], 16))


def _to_signed_int64(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
