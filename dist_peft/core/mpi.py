"""Rendezvous address of the ranks of ``mpirun`` where ``MASTER_ADDR`` is not exported.

MPI launchers tell each process its rank, not the host of rank 0. mpi4py carries the question:
rank 0 broadcasts its addresses and a free port, every rank tries which address answers it. MPI is
finalized at once; all later traffic is torch's.
"""

import json
import os
import sys
from typing import Any

import numpy as np

from dist_peft.core.errors import UserError
from dist_peft.core.launchers import LaunchInfo
from dist_peft.core.network import AddressProbeServer

__all__ = ["exchange_master_address"]

WAYS_OUT = "export MASTER_ADDR=<host of rank 0> and MASTER_PORT=<free port> on all ranks"


def exchange_master_address(place: LaunchInfo) -> tuple[str, int]:
    """Return the address under which this rank reaches rank 0, and the port; called by every rank.

    Raises:
        UserError: mpi4py is not installed or belongs to another MPI; no address of rank 0 answers.
    """
    MPI = _import_mpi(place)
    MPI.Init()
    try:
        return _exchange_over_mpi(place, MPI.COMM_WORLD, MPI.Get_library_version().split(",")[0])
    finally:
        MPI.Finalize()


def _import_mpi(place: LaunchInfo) -> Any:
    if "MPI4PY_MPIABI" not in os.environ:
        # with several MPI libraries installed, mpi4py would take the first that it finds
        name = {"openmpi": "libmpi.so.40", "mpich": "libmpi.so.12"}[place.launcher]
        os.environ.setdefault("MPI4PY_LIBMPI", f"{sys.exec_prefix}/lib/{name}:{name}")
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{place.launcher} started {place.size} processes, but MASTER_ADDR is not set and "
            f"mpi4py cannot be used to find it ({error}); {WAYS_OUT}, or install mpi4py"
        ) from None
    return MPI


def _exchange_over_mpi(place: LaunchInfo, comm: Any, library: str) -> tuple[str, int]:
    if (comm.rank, comm.size) != (place.rank, place.size):
        raise UserError(
            f"{place.launcher} started this process as rank {place.rank} of {place.size}, but "
            f"mpi4py ({library}) says {comm.rank} of {comm.size}: it was not built for "
            f"this launcher's MPI; set MPI4PY_MPIABI or MPI4PY_LIBMPI, or {WAYS_OUT}"
        )
    greeter = AddressProbeServer() if place.rank == 0 else None
    offer = [greeter.list_addresses(), greeter.port, greeter.word.hex()] if greeter else None
    addresses, port, word = _broadcast_json(comm, offer)
    word = bytes.fromhex(word)
    mine = next((a for a in addresses if AddressProbeServer.is_reachable(a, port, word)), None)
    answers: list[tuple[str, str | None]] = _all_gather_json(comm, (place.host, mine))
    if greeter is not None:
        greeter.close()
    lost = [f"rank {r} on {host}" for r, (host, found) in enumerate(answers) if found is None]
    if lost or mine is None:
        raise UserError(
            f"{', '.join(lost)} cannot reach rank 0 on {answers[0][0]} at any of "
            f"{', '.join(addresses)} (port {port}); check firewalls, or {WAYS_OUT}"
        )
    comm.Barrier()  # the port is free again before any rank continues
    if place.rank == 0 and len({found for _, found in answers}) > 1:
        mine = "0.0.0.0"  # ranks reach it under several addresses
    return mine, port


# mpi4py's methods in lower case pickle; those with a capital send buffers


def _broadcast_json(comm: Any, value: object) -> Any:
    """Return rank 0's ``value`` on every rank."""
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    length = np.array([len(data)], dtype=np.int64)
    comm.Bcast(length, root=0)
    buffer = data.copy() if comm.rank == 0 else np.empty(int(length[0]), dtype=np.uint8)
    comm.Bcast(buffer, root=0)
    return json.loads(buffer.tobytes())


def _all_gather_json(comm: Any, value: object) -> list[Any]:
    """Return the values of all ranks, by rank."""
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    lengths = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(np.array([len(data)], dtype=np.int64), lengths)
    padded = np.zeros(int(lengths.max()), dtype=np.uint8)
    padded[: len(data)] = data
    parts = np.empty((comm.size, len(padded)), dtype=np.uint8)
    comm.Allgather(padded, parts)
    return [json.loads(row[:n].tobytes()) for row, n in zip(parts, lengths, strict=True)]
