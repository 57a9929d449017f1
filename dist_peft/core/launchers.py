"""Detect the launcher, rank and world size: the only reader of launcher variables.

``detect`` knows torchrun, the deepspeed launcher, Open MPI, MPICH (and other PMI launchers) and
SLURM steps. Launchers nest, and each leaves its variables in the environment of the next, so the
order matters:

========================================  ==================================================
torchrun or deepspeed under srun, mpirun  ``RANK`` is right; ``SLURM_PROCID`` numbers the agents
mpirun inside sbatch                      MPI's are right; ``SLURM_PROCID`` numbers the daemons
srun with a PMI plug-in                   both say the same; SLURM also knows the hosts
the batch script itself                   ``SLURM_PROCID=0`` and N tasks, but no step: not a rank
========================================  ==================================================

Incomplete or contradictory variables are refused: falling back to one process would start N
single-process runs that write into the same directory.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dist_peft.core.errors import UserError

__all__ = [
    "LaunchInfo",
    "derive_job_port",
    "detect_launch",
    "expand_host_list",
    "expand_task_counts",
]

DEFAULT_PORT = 29500
PORTS = range(20000, 30000)
"""Where the port of a SLURM job lies: below Linux's ephemeral ports, which start at 32768."""

_MOST_HOSTS = 1_000_000


@dataclass(frozen=True)
class LaunchInfo:
    """Rank, world size and rendezvous address of this process, as set by the launcher.

    Attributes:
        rank, size: number of this process, and of all.
        local_rank, local_size: the same within this host.
        launcher: python, torchrun, deepspeed, slurm, openmpi, mpich; environment: only ``RANK``
            and its companions are set; sbatch: a batch script of several tasks outside of srun.
        address, port: where the ranks meet; no address: to be exchanged through MPI.
        host: the name of this host.
        hosts: every host of the run, where the launcher lists them.
        agent: restart count, when torchrun's agent (and not rank 0) serves the store.
        job: the launcher's name of this run, the same on every rank; empty where it has none.
        command: the command of this process, in words that are the same on every rank.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "python"
    address: str | None = None
    port: int | None = None
    host: str = field(default_factory=socket.gethostname)
    hosts: tuple[str, ...] = ()
    agent: int | None = None
    job: str = field(default="", compare=False)
    command: str = field(default="", compare=False)


def detect_launch(env: Mapping[str, str] | None = None) -> LaunchInfo:
    """Read the launcher's variables.

    Raises:
        UserError: the variables are incomplete, not numbers, or contradict each other.
    """
    variables = _LauncherVariables(os.environ if env is None else env)
    place = _detect_from_variables(variables)
    return replace(place, job=_build_job_id(place.launcher, variables))


def _build_job_id(launcher: str, variables: "_LauncherVariables") -> str:
    """Return a name that distinguishes runs of one launcher and is the same on every rank.

    A SLURM job id does not identify the run where torchrun, deepspeed or a person started the
    ranks: one run may extend over several jobs or steps, and ssh passes no such variable on. MPICH
    sets no name.
    """
    if launcher == "torchrun":
        # torchrun's default is the word "none"
        name = variables.get_text("TORCHELASTIC_RUN_ID") or "none"
        return "" if name == "none" else f"torchrun run {name}"
    if launcher == "slurm":
        job = variables.get_text("SLURM_HET_JOB_ID") or variables.get_text("SLURM_JOB_ID")
        return f"SLURM step {job}.{variables.get_text('SLURM_STEP_ID')}"
    if launcher == "openmpi":
        name = (
            variables.get_text("PMIX_NAMESPACE")
            or variables.get_text("OMPI_MCA_ess_base_jobid")
            or ""
        )
        return f"Open MPI job {name}" if name else ""
    return ""


def _detect_from_variables(variables: "_LauncherVariables") -> LaunchInfo:
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return _detect_explicit(variables)
    step = _detect_slurm(variables)
    mpi = _detect_mpi(variables)
    if mpi is not None and (step is None or (step.rank, step.size) != (mpi.rank, mpi.size)):
        return mpi
    if step is not None:
        return step
    half = ("PMI_RANK" in variables) != ("PMI_SIZE" in variables)
    for name in ("PMIX_RANK", "MV2_COMM_WORLD_RANK", *(("PMI_RANK", "PMI_SIZE") if half else ())):
        if name in variables:
            raise UserError(
                f"{name} is set by an MPI launcher that does not say which process of how "
                "many this is; export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
    if "SLURM_JOB_ID" in variables and "SLURM_STEP_ID" not in variables:
        tasks = variables.parse_number("SLURM_NTASKS", 1)
        if max(tasks, variables.parse_number("SLURM_JOB_NUM_NODES", 1)) > 1:
            return LaunchInfo(launcher="sbatch")
    return LaunchInfo()


class _LauncherVariables:
    """The environment, with messages that name the variable."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def __contains__(self, name: str) -> bool:
        return name in self._env

    def get_text(self, name: str) -> str | None:
        return self._env.get(name)

    def require_text(self, name: str, present: str) -> str:
        if name not in self._env:
            raise UserError(
                f"the environment is incomplete: {name} is not set, although {present} is; start "
                "all processes through one launcher, or set it by hand"
            )
        return self._env[name]

    def parse_number(self, name: str, default: int | None = None, present: str = "") -> int:
        if default is not None and name not in self._env:
            return default
        text = self.require_text(name, present)
        try:
            return int(text)
        except ValueError:
            raise UserError(f"environment variable {name}={text!r} is not a number") from None

    def build_launch_info(
        self, launcher: str, rank: str, size: str, local: str, local_size: str
    ) -> LaunchInfo:
        """Build a place from four variables; one process needs no local rank."""
        ranks, index = self.parse_number(size, present=rank), self.parse_number(rank, present=size)
        if not 0 <= index < ranks:
            raise UserError(f"the environment says {rank}={index} of {size}={ranks}")
        return LaunchInfo(
            rank=index,
            size=ranks,
            local_rank=self.parse_number(local, 0 if ranks == 1 else None, present=rank),
            local_size=self.parse_number(local_size, 1),
            launcher=launcher,
        )

    def with_master_address(self, place: LaunchInfo, address: str | None, port: int) -> LaunchInfo:
        """Return ``place`` with ``MASTER_ADDR`` and ``MASTER_PORT``; default: the arguments."""
        address = self.get_text("MASTER_ADDR") or address
        found = replace(place, address=address, port=self.parse_number("MASTER_PORT", port))
        if found.port is not None and not 0 < found.port < 2**16:
            raise UserError(f"MASTER_PORT={found.port} is no port; choose one of 1 to 65535")
        elsewhere = place.local_size <= place.rank
        if elsewhere and address and re.match(r"localhost$|127\.|::1$", address):
            raise UserError(
                f"MASTER_ADDR={address} means this host, but rank {place.rank} of {place.size} "
                f"is not on rank 0's host (it has {place.local_size} ranks); export the name or "
                "address under which the other hosts reach the host of rank 0"
            )
        return found


def _detect_explicit(variables: _LauncherVariables) -> LaunchInfo:
    """Detect torchrun, deepspeed, or variables set by hand (container platform, shell script)."""
    launcher, local_size = "environment", "LOCAL_WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" in variables:
        launcher, group = "torchrun", "GROUP_WORLD_SIZE"
    elif "CROSS_SIZE" in variables or "LOCAL_SIZE" in variables:
        launcher, local_size, group = "deepspeed", "LOCAL_SIZE", "CROSS_SIZE"
    place = variables.build_launch_info(launcher, "RANK", "WORLD_SIZE", "LOCAL_RANK", local_size)
    outer = _detect_mpi(variables) or _detect_slurm(variables)
    if outer is not None and outer.size > 1:
        if launcher == "environment" and (outer.rank, outer.size) != (place.rank, place.size):
            raise UserError(
                f"RANK={place.rank} of WORLD_SIZE={place.size} contradicts {outer.launcher}, "
                f"which started this process as {outer.rank} of {outer.size}; "
                "unset RANK and WORLD_SIZE, or start without that launcher"
            )
        if launcher != "environment" and variables.parse_number(group, outer.size) == 1:
            raise UserError(
                f"{outer.launcher} started {outer.size} copies of {launcher}, and each runs "
                f"alone; pass {launcher} the number of nodes and the rendezvous address, or start "
                f"it once"
            )
    if place.size > 1:
        variables.require_text("MASTER_ADDR", "WORLD_SIZE")
    place = variables.with_master_address(place, None, DEFAULT_PORT)
    if variables.get_text("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = replace(place, agent=variables.parse_number("TORCHELASTIC_RESTART_COUNT", 0))
    return place


def _detect_mpi(variables: _LauncherVariables) -> LaunchInfo | None:
    if "OMPI_COMM_WORLD_RANK" in variables:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        place = variables.build_launch_info(
            "openmpi", *(f"OMPI_COMM_WORLD_{name}" for name in names)
        )
    elif "PMI_RANK" in variables and "PMI_SIZE" in variables:
        # srun's PMI plug-in sets no MPI_LOCAL...; SLURM's own variables say it
        local = "MPI_LOCALRANKID" if "MPI_LOCALRANKID" in variables else "SLURM_LOCALID"
        place = variables.build_launch_info(
            "mpich", "PMI_RANK", "PMI_SIZE", local, "MPI_LOCALNRANKS"
        )
    else:
        return None
    return variables.with_master_address(place, None, DEFAULT_PORT)


def _detect_slurm(variables: _LauncherVariables) -> LaunchInfo | None:
    """Detect a task of a SLURM step of several tasks."""
    if "SLURM_STEP_ID" not in variables or variables.parse_number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return None
    place = variables.build_launch_info(
        "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"
    )
    tasks = expand_task_counts(variables.require_text("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID"))
    node = variables.parse_number("SLURM_NODEID", present="SLURM_STEP_ID")
    if node >= len(tasks):
        raise UserError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE names {len(tasks)}")
    hosts = expand_host_list(variables.require_text("SLURM_STEP_NODELIST", "SLURM_STEP_ID"))
    place = replace(
        place,
        local_size=tasks[node],
        hosts=tuple(hosts),
        host=variables.get_text("SLURMD_NODENAME") or place.host,
    )
    port = derive_job_port(variables.parse_number("SLURM_JOB_ID", present="SLURM_STEP_ID"))
    return variables.with_master_address(place, hosts[0], port)


def derive_job_port(job: int) -> int:
    """Return the rendezvous port of SLURM job ``job``, used unless ``MASTER_PORT`` is set."""
    return PORTS[job % len(PORTS)]


def expand_host_list(text: str) -> list[str]:
    """Expand ``n[08-10,12],login`` to ``n08 n09 n10 n12 login``, as ``scontrol show hostnames``.

    Raises:
        UserError: not a SLURM host list.
    """
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            tails = (
                [literal]
                if literal
                else [n for r in ranges.split(",") for n in _expand_number_range(r)]
            )
            names = [name + tail for name in names for tail in tails]
        hosts += names
    if not hosts or text.count("[") != text.count("]"):
        raise UserError(f"cannot read the SLURM host list {text!r}; export MASTER_ADDR")
    return hosts


def _expand_number_range(text: str) -> list[str]:
    """Expand ``08-10`` to ``08 09 10``; one number is a range of one."""
    first, _, last = text.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal()):
        raise UserError(f"cannot read {text!r} in a SLURM host list; export MASTER_ADDR")
    if int(last) - int(first) >= _MOST_HOSTS:
        raise UserError(f"cannot read {text!r} in a SLURM host list: too many; export MASTER_ADDR")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def expand_task_counts(text: str) -> list[int]:
    """Expand ``2(x3),1`` to ``2 2 2 1``: the number of tasks on each host of a step."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None or int(match[2] or 1) > _MOST_HOSTS:
            raise UserError(
                f"cannot read SLURM_STEP_TASKS_PER_NODE={text!r}; start the ranks with srun, or "
                "export RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
