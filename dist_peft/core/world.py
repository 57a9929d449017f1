"""Process group of a run: rendezvous, agreement between ranks and error propagation.

``launchers`` detects rank and world size, ``core.rendezvous`` performs the rendezvous.

``World.raise_together`` is how an error of one rank becomes an error of all: every rank runs the
phase, then all exchange the outcome, so that no rank waits in a collective for one that has left.
"""

import importlib.metadata
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_peft.core.collective_errors import is_collective_error
from dist_peft.core.errors import UserError
from dist_peft.core.launchers import LaunchInfo, detect_launch
from dist_peft.core.machine import raise_open_file_limit
from dist_peft.core.patient_wait import LostRankError
from dist_peft.core.progress_beat import (
    SETUP_PATIENCE,
    connect_to_ranks,
    enter_phase,
    wait_for_ranks,
)
from dist_peft.core.rendezvous import Rendezvous, RendezvousError, join_rendezvous
from dist_peft.core.stall_watch import StallReport, StallWatch
from dist_peft.core.stop_signals import StopRequested, is_stop_requested
from dist_peft.core.text_exchange import all_gather_texts

__all__ = ["RemoteError", "RendezvousError", "StallReport", "World", "close_stall_watch"]


T = TypeVar("T")

_meeting: Rendezvous | None = None
"""The rendezvous of this process; one a process, as torch's process group."""

_watch: StallWatch | None = None
"""Watches the progress of this process and of the other ranks."""

_VERSIONS = ("dist_peft", "torch", "transformers", "tokenizers")
"""Distributions that must be of one version on every rank."""


class RemoteError(RuntimeError):
    """Another rank failed in a phase that all ranks share; that rank has the details."""


class World(LaunchInfo):
    """A launched process (attributes: ``Place``) that can communicate with the other ranks."""

    @classmethod
    def detect_world(cls, env: Mapping[str, str] | None = None) -> "World":
        """Read the launcher's variables.

        Raises:
            UserError: the variables are incomplete, not numbers, or contradict each other.
        """
        return cls(**vars(detect_launch(env)))

    # -- rendezvous ----------------------------------------------------------------------------

    def select_device(self, wanted: str) -> torch.device:
        """Return this rank's device for ``auto``, ``cpu`` or ``cuda``.

        Where a launcher shows each task one device of its own (``srun --gpus-per-task=1``,
        ``CUDA_VISIBLE_DEVICES`` set by a wrapper), that is ``cuda:0`` on every rank; ranks that
        see the same device are refused at the rendezvous.

        Raises:
            UserError: there is no CUDA device, or this host has fewer than ranks.
        """
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device is cuda but torch sees no CUDA device; use cpu or auto")
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if count == 1:
            return torch.device("cuda", 0)
        if self.local_rank >= count:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank} on host {socket.gethostname()}, "
                f"which shows {count} CUDA devices; start at most {count} processes a node"
            )
        return torch.device("cuda", self.local_rank)

    def join_process_group(
        self,
        device: torch.device,
        timeout_minutes: float = 30.0,
        start_timeout_minutes: float = 10.0,
        *,
        stall_seconds: float = 0.0,
        on_stall: Callable[[StallReport], None] | None = None,
    ) -> None:
        """Meet the other ranks and join the process group (NCCL on CUDA with gloo for CPU
        tensors, gloo elsewhere).

        Args:
            timeout_minutes: the longest wait in one collective, later.
            start_timeout_minutes: the longest wait for all ranks to come, now.
            stall_seconds: the longest time without progress (``core.progress_beat``); 0: no limit.
            on_stall: called from a thread after it; ends the process. None: nothing is called.

        Raises:
            RendezvousError: a rank is missing, the address is wrong, or ranks of another run or
                another version joined.
            LostRankError: a rank died after it had come.
            UserError: the launcher was not used: a batch script's own process.
        """
        if self.launcher == "sbatch":
            raise UserError(
                "this is a batch script's own process, outside of srun: one process would use "
                "an allocation of several tasks or nodes alone; start it with srun (srun -n 1 "
                "for one process), torchrun or mpirun"
            )
        if dist.is_initialized():
            return
        global _meeting, _watch
        if self.size == 1:
            if on_stall is not None and stall_seconds:
                close_stall_watch()
                _watch = StallWatch(0, [self.host], None, stall_seconds, on_stall)
            return
        raise_open_file_limit()
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        uuid = read_device_uuid(device) if cuda else ""
        token = self.build_run_token(device)
        _meeting = join_rendezvous(self, start_timeout_minutes * 60, token, uuid)
        store = _meeting.background_store
        _watch = StallWatch(self.rank, _meeting.hosts, store, stall_seconds, on_stall)
        with enter_phase("connect the ranks", SETUP_PATIENCE):
            with wait_for_ranks():  # a rank that died since: gloo would wait ``timeout_minutes``
                _meeting.wait_for_all("connect the ranks")
            with connect_to_ranks():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if cuda else "gloo",
                    store=_meeting.store,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(minutes=timeout_minutes),
                    # NCCL connects at once, and splits this communicator for groups of fewer ranks
                    device_id=device if cuda else None,
                )

    def build_run_token(self, device: torch.device) -> dict[str, str]:
        """Return the facts that identify this run at the rendezvous, equal on every rank. The
        configuration is compared afterwards, key by key (``check_agreement``)."""
        versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
        who = {"run": self.job, "command": self.command, "device": device.type}
        return who | {f"version of {name}": version for name, version in versions.items()}

    def leave_process_group(self) -> None:
        global _meeting
        close_stall_watch()
        if dist.is_initialized():
            dist.destroy_process_group()
        if _meeting is not None:
            _meeting.close()
            _meeting = None

    def explain_failure(self, error: Exception) -> str | None:
        """Identify the rank that failed; None if ``error`` is not a failed collective.

        Takes some seconds, in which ranks that live give a sign of life.
        """
        if isinstance(error, LostRankError):
            return f"rank {self.rank} on {self.host} stops: {error}"
        if _watch is None or _meeting is None or not is_collective_error(error):
            return None
        with wait_for_ranks():
            silent, other = _watch.explain_silence()
        if silent:
            return f"rank {self.rank} on {self.host} lost its peers: no sign of life from {silent}"
        return f"rank {self.rank} on {self.host} stops: {other}" if other else None

    def announce_failure(self, reason: str) -> None:
        """Tell the other ranks why this one fails; it ends afterwards."""
        if _watch is not None:
            _watch.close(reason)

    @property
    def rank_hosts(self) -> Sequence[str]:
        """The host of each rank, by the host's own name; empty before the rendezvous."""
        return () if _meeting is None else _meeting.hosts

    # -- agreement -----------------------------------------------------------------------------

    @property
    def data_rank(self) -> int:
        """Data-parallel rank: which of ``data_size`` shares of the micro-batches is this rank's.

        Every rank has a share of its own, so it is ``rank``; ranks that computed one micro-batch
        together (tensor or sequence parallelism) would have one data rank.
        """
        return self.rank

    @property
    def data_size(self) -> int:
        """Number of shares that the micro-batches are dealt into; see ``data_rank``."""
        return self.size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    def barrier(self) -> None:
        """Wait for all ranks: an all-reduce of a CPU byte works on every backend."""
        if self.size > 1:
            _all_reduce(torch.zeros(1, dtype=torch.uint8))

    def check_agreement(
        self, subject: str, values: Mapping[str, object], timeout_minutes: float = 30.0
    ) -> None:
        """Check that all ranks have the same ``values``, without a collective.

        Args:
            subject: for the message, such as ``configuration``.
            values: by key; anything that JSON can represent.
            timeout_minutes: the longest wait for the others.

        Raises:
            UserError: on every rank, naming keys, values, ranks and hosts.
        """
        if self.size == 1:
            return
        assert _meeting is not None, "connect() comes first"
        with enter_phase(f"compare the {subject}"), wait_for_ranks():
            difference = _meeting.find_disagreement(values, timeout_minutes * 60)
        if difference:
            raise UserError(
                f"the ranks of this run do not have the same {subject}: {difference}. Give every "
                "rank the same; if these are two runs, give each a MASTER_PORT of its own"
            )

    def gather_integers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Gather the integers (int64, equally many on each rank) of all ranks, by rank."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with wait_for_ranks():
            dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def any_rank(self, flag: bool) -> bool:
        """Return on every rank whether ``flag`` is true on any."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        _all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Sum each number over the ranks (in double precision)."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        _all_reduce(total)
        return [float(v) for v in total]

    def max_over_ranks(self, *values: float) -> list[float]:
        """Return the maximum of each number over the ranks."""
        if self.size == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.float64)
        _all_reduce(most, dist.ReduceOp.MAX)
        return [float(v) for v in most]

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place. Integers: bit-equal at any number of ranks.

        A collective: all ranks come, with equal shapes and types.
        """
        if self.size > 1:
            _all_reduce(tensor)

    def broadcast_tensor(self, tensor: Tensor, source: int) -> None:
        """Copy the tensor of rank ``source`` to every rank, in place."""
        assert tensor.is_contiguous()  # the received tensor is laid out so
        if self.size > 1:
            with wait_for_ranks():
                dist.broadcast(tensor, source)

    @contextmanager
    def raise_together(self, phase: str, *, is_slow: bool = False) -> Iterator[None]:
        """Run a phase on every rank; if it fails on one, it fails on all, at its end.

        Args:
            phase: for messages.
            is_slow: a rank may take hours longer than others (download, tokenization): they wait
                without the time limit of a collective, as long as it gives signs of life.

        The body must hold no collective that a failing rank would leave others waiting in. Every
        rank raises the error of the lowest failing rank: that rank its own exception, the others a
        ``UserError`` with the same text, or ``RemoteError`` for an error that is not the user's.
        ``StopRequested`` of any rank is raised on all, unless another rank has failed.
        """
        failure: Exception | None = None
        try:
            with enter_phase(phase, 2 * SETUP_PATIENCE if is_slow else 1.0):
                yield
        except Exception as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        if is_slow and _meeting is not None:
            with wait_for_ranks():
                _meeting.wait_for_all(phase)
        if not self.any_rank(failure is not None):
            return
        mine = None if failure is None else (_classify_failure(failure), str(failure))
        with wait_for_ranks():
            everyone = [json.loads(text) for text in all_gather_texts(json.dumps(mine))]
        failed = {r: entry for r, entry in enumerate(everyone) if entry is not None}
        first = min(failed, key=lambda r: (failed[r][0] == "stop", r))
        if first == self.rank and failure is not None:
            raise failure
        kind, text = failed[first]
        if kind == "user":
            raise UserError(text)
        if kind == "stop":
            raise StopRequested(text)
        raise RemoteError(f"rank {first} failed in phase {phase!r}: {text}")

    def raise_if_stop_requested(self) -> None:
        """Raise ``StopRequested`` on every rank if a signal has reached any. Collective.

        A safe point of a phase that has no checkpoint to write.
        """
        if self.any_rank(is_stop_requested()):
            raise StopRequested

    def run_node_first(self, phase: str, action: Callable[[], T]) -> T:
        """Return ``action()``; the first rank of each node calls it before the others there.

        For downloads and caches, which the others of a node find complete. They wait without a
        limit of time; an error of one rank is every rank's.
        """
        found: list[T] = []
        for is_first in (True, False):
            with self.raise_together(phase, is_slow=True):
                if self.is_first_of_node == is_first:
                    found.append(action())
        return found[0]

    def run_on_first(self, phase: str, action: Callable[[], object]) -> None:
        """Call ``action`` on the first rank alone; its error is every rank's.

        The way to write files or print for all: code outside of this class, engines and writers
        asks for no rank. See ``raise_together``; ``action`` must hold no collective.
        """
        with self.raise_together(phase):
            if self.is_first:
                action()


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    with wait_for_ranks():
        dist.all_reduce(tensor, operation)


def close_stall_watch() -> None:
    """Watch this process no longer."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def read_device_uuid(device: torch.device) -> str:
    """Return the UUID of a CUDA device, the same in every process; empty if unknown."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def _classify_failure(error: Exception) -> str:
    if isinstance(error, StopRequested):
        return "stop"
    return "user" if isinstance(error, UserError) else "other"
