"""Which process am I, and how do processes agree: the only reader of launcher variables.

``World.from_env`` understands torchrun and the deepspeed launcher (``RANK``, ``WORLD_SIZE``),
SLURM steps (``SLURM_PROCID`` ...), Open MPI (``OMPI_COMM_WORLD_*``) and MPICH/PMI
(``PMI_RANK`` ...), in this order, else one process. A set that is incomplete or contradicts
itself is refused: falling back to one process would start N jobs that each believe to be alone.

``World.together`` is how an error of one rank becomes an error of all: every rank runs the phase,
then all exchange what happened, so that nobody waits in a collective for a rank that has left.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_peft.core.errors import UserError

__all__ = ["RemoteError", "World"]


class RemoteError(RuntimeError):
    """Another rank failed in a phase that all ranks share; that rank has the details."""


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size: number of this process, and of all.
        local_rank, local_size: the same within this node.
        launcher: who started the processes: python, torchrun, slurm, openmpi, pmi.
        address, port: where the ranks meet (``None`` for one process).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "python"
    address: str | None = None
    port: int | None = None

    # -- finding out ---------------------------------------------------------------------------

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "World":
        """Read the launcher's variables.

        Raises:
            UserError: the variables are incomplete, not numbers, or contradict each other.
        """
        env = os.environ if env is None else env
        if "RANK" in env or "WORLD_SIZE" in env:
            return cls._read(
                env, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
            )
        if "OMPI_COMM_WORLD_RANK" in env:
            prefix = "OMPI_COMM_WORLD_"
            return cls._read(
                env,
                "openmpi",
                *(prefix + n for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
            )
        if "PMI_RANK" in env:
            return cls._read(
                env, "pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
            )
        # a batch script itself has SLURM_PROCID=0 but no step: it is not rank 0 of N
        if "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            return cls._read(
                env,
                "slurm",
                "SLURM_PROCID",
                "SLURM_STEP_NUM_TASKS",
                "SLURM_LOCALID",
                "SLURM_NTASKS_PER_NODE",
            )
        return cls()

    @classmethod
    def _read(
        cls, env: Mapping[str, str], launcher: str, rank: str, size: str, local: str, locals_: str
    ) -> "World":
        def number(name: str, default: int | None = None) -> int:
            text = env.get(name)
            if text is None and default is not None:
                return default
            if text is None:
                raise UserError(
                    f"{launcher} environment is incomplete: {name} is not set beside {rank}; "
                    f"start all processes through one launcher"
                )
            try:
                return int(text)
            except ValueError:
                raise UserError(f"environment variable {name}={text!r} is not a number") from None

        ranks, index = number(size), number(rank)
        if not 0 <= index < ranks:
            raise UserError(f"environment says {rank}={index} of {size}={ranks}")
        world = cls(
            rank=index,
            size=ranks,
            local_rank=number(local, 0 if ranks == 1 else None),
            local_size=number(locals_, 1),
            launcher=launcher,
            address=env.get("MASTER_ADDR"),
            port=number("MASTER_PORT", 29500) if "MASTER_ADDR" in env else None,
        )
        if ranks > 1 and world.address is None:
            raise UserError(
                f"{launcher} started {ranks} processes but MASTER_ADDR is not set; export "
                "MASTER_ADDR=<host of rank 0> and MASTER_PORT=<free port>"
            )
        return world

    # -- meeting -------------------------------------------------------------------------------

    def device(self, wanted: str) -> torch.device:
        """``auto``, ``cpu`` or ``cuda`` -> this rank's device."""
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device is cuda but torch sees no CUDA device; use cpu or auto")
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank} on host {socket.gethostname()}, "
                f"which shows {count} CUDA devices; start at most {count} processes a node"
            )
        return torch.device("cuda", self.local_rank)

    def connect(self, device: torch.device, timeout_minutes: float = 30.0) -> None:
        """Join the process group (NCCL on CUDA with gloo for CPU tensors, gloo elsewhere)."""
        if self.size == 1 or dist.is_initialized():
            return
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        timeout = timedelta(minutes=timeout_minutes)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                init_method=f"tcp://{self.address}:{self.port}",
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(
                f"rank {self.rank} of {self.size} could not meet the others at "
                f"{self.address}:{self.port} within {timeout_minutes:g} minutes: {error}"
            ) from None

    def disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- agreeing ------------------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    def barrier(self) -> None:
        """Wait for all. An all-reduce of a CPU byte: works on every backend, names no device."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1, dtype=torch.uint8))

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def sum(self, *values: float) -> list[float]:
        """Sum each number over the ranks (in double precision)."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(v) for v in total]

    def max(self, *values: float) -> list[float]:
        """The largest of each number over the ranks."""
        if self.size == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return [float(v) for v in most]

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Run a phase on every rank; if it fails on one, it fails on all, at its end.

        The body must hold no collective that a failing rank would leave others waiting in. Every
        rank raises the error of the lowest failing rank: that rank its own exception, the others a
        ``UserError`` with the same text, or ``RemoteError`` for what is no user's fault.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        if not self.any(failure is not None):
            return
        mine = None if failure is None else (isinstance(failure, UserError), str(failure))
        everyone: list[tuple[bool, str] | None] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        if failure is not None and all(e is None for e in everyone[: self.rank]):
            raise failure
        first = next(r for r, e in enumerate(everyone) if e is not None)
        is_users, text = everyone[first] or (False, "")
        if is_users:
            raise UserError(text)
        raise RemoteError(f"rank {first} failed in phase {phase!r}: {text}")
