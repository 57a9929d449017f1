"""Whole commands in forked processes: ``dist-peft ARGUMENTS`` without a new interpreter.

Each process runs ``app.cli.main`` in a working directory and an environment of its own, with
stdout and stderr in files, and under limits of CPU time and memory: what does not end, or asks for
an absurd allocation, fails alone.
"""

import multiprocessing as mp
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.dist import free_port, make_process_context
from tests.support.tiers import note_process

CPU_SECONDS = 25
"""Of one process; a command that refuses its input takes one or two."""
WALL_SECONDS = float(os.environ.get("WALL", "150"))
MEMORY_BYTES = 6 << 30
"""In addition to what the process has mapped."""

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL", "MASTER", "SLURM", "PMI", "OMPI", "TORCHELASTIC")


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: by a signal; None: stopped at the limit)."""

    code: int | None
    stdout: str
    stderr: str


def run_forked(
    arguments: Sequence[str],
    directory: Path,
    *,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    rank_arguments: Mapping[int, Sequence[str]] | None = None,
    rank_env: Mapping[int, Mapping[str, str]] | None = None,
    wall_seconds: float = WALL_SECONDS,
) -> list[Ended]:
    """Run ``dist-peft ARGUMENTS`` in ``directory`` and return how each rank ended.

    Args:
        arguments: the verb and its options.
        directory: the working directory.
        ranks: number of processes; more than one get the variables of a launcher.
        env: further variables of all.
        rank_arguments, rank_env: further arguments and variables of one rank; an empty variable is
            unset.
        wall_seconds: after which those that are left are killed.
    """
    note_process("a command")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
    port = str(free_port()) if ranks > 1 else ""
    with tempfile.TemporaryDirectory() as outputs:
        started = []
        for rank in range(ranks):
            own = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            place = {k: str(v) for k, v in own.items()} if ranks > 1 else {}
            if ranks > 1:
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = clean | place | dict(env or {}) | dict((rank_env or {}).get(rank, {}))
            words = [*arguments, *(rank_arguments or {}).get(rank, ())]
            process = make_process_context().Process(
                target=_run_main,
                args=({k: v for k, v in variables.items() if v}, directory, words, outputs, rank),
                daemon=True,
            )
            process.start()
            started.append(process)
        end = time.monotonic() + wall_seconds
        return [_collect(process, Path(outputs), rank, end) for rank, process in enumerate(started)]


def _collect(process: mp.process.BaseProcess, outputs: Path, rank: int, end: float) -> Ended:
    process.join(max(end - time.monotonic(), 0.1))
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    text = [(outputs / f"{name}-{rank}").read_text(errors="replace") for name in ("out", "err")]
    return Ended(code, *text)


def _run_main(
    variables: dict[str, str], directory: Path, words: list[str], outputs: str, rank: int
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{outputs}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    os.chdir(directory)
    os.environ.clear()  # the server's is that of the first test
    os.environ.update(variables)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, resource.RLIM_INFINITY))
    from dist_peft.app.cli import main
    from tests.support.curves import skip_curves

    with skip_curves():
        code = main(words)
    sys.exit(code)
