"""The exchange through MPI, with a communicator of threads in place of mpirun's.

Real ones: ``tests/launch/test_mpi.py``.
"""

import builtins
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dist_peft.core import mpi
from dist_peft.core.errors import UserError
from dist_peft.core.launchers import LaunchInfo
from dist_peft.core.network import AddressProbeServer


class Threads:
    """What the exchange uses of an MPI communicator, between threads."""

    def __init__(self, rank: int, size: int, shared: dict[Any, Any], barrier: Any) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier

    def Bcast(self, buffer: Any, root: int) -> None:
        buffer[:] = self._exchange(buffer)[root]

    def Allgather(self, mine: Any, all_: Any) -> None:
        all_.reshape(self.size, -1)[:] = self._exchange(mine)

    def _exchange(self, value: Any) -> list[Any]:
        value = value.copy()
        self._shared[self.rank] = value
        self._barrier.wait(30)
        values = [self._shared[r] for r in range(self.size)]
        self._barrier.wait(30)
        return values

    def Barrier(self) -> None:
        self._barrier.wait(30)


def exchange(size: int) -> list[Any]:
    shared: dict[Any, Any] = {}
    barrier, results = threading.Barrier(size), [None] * size

    def rank(r: int) -> None:
        place = LaunchInfo(r, size, r, size, "mpich", host=f"host{r}")
        try:
            results[r] = mpi._exchange_over_mpi(place, Threads(r, size, shared, barrier), "MPICH")
        except UserError as error:
            results[r] = str(error)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_agree_on_a_port_they_reach() -> None:
    results = exchange(3)
    assert len({port for _, port in results}) == 1
    assert all(isinstance(address, str) for address, _ in results)


def test_unreachable_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AddressProbeServer, "is_reachable", staticmethod(lambda *_: False))
    monkeypatch.setattr(AddressProbeServer, "list_addresses", lambda self: ["192.0.2.1"])
    for text in exchange(2):
        assert "rank 0 on host0, rank 1 on host1 cannot reach rank 0 on host0" in text
        assert "192.0.2.1" in text


def test_singletons_are_refused() -> None:
    alone = Threads(0, 1, {}, threading.Barrier(1))
    with pytest.raises(UserError, match=r"rank 1 of 2, but mpi4py \(MPICH\) says 0 of 1"):
        mpi._exchange_over_mpi(LaunchInfo(1, 2, 1, 2, "openmpi"), alone, "MPICH")


def test_absent_mpi4py_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", without("mpi4py", builtins.__import__))
    monkeypatch.setenv("MPI4PY_LIBMPI", "")
    with pytest.raises(UserError, match=r"export MASTER_ADDR=.* or install mpi4py"):
        mpi.exchange_master_address(LaunchInfo(1, 2, 1, 2, "openmpi"))


def without(module: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(module):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    return find
