"""One small run that every launcher repeats, and its outcome with one process."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from tests.support.cluster import Slurm, need
from tests.support.tiny_runs import save_config, tiny_tree

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


@dataclass(frozen=True)
class SmallRun:
    """A configuration on disk, the directory of the run, and the losses of one process."""

    config: Path
    directory: Path
    expected: list[float]

    def losses(self) -> list[float]:
        return losses(self.directory)

    def check(self) -> None:
        """The run in ``directory`` learnt what one process learns."""
        assert self.losses() == pytest.approx(self.expected, rel=1e-5)
        assert (self.directory / "adapter" / "adapter_model.safetensors").is_file()


def losses(directory: Path) -> list[float]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def small_tree(directory: Path, steps: int) -> dict[str, Any]:
    return tiny_tree(
        directory,
        train__global_batch=4,
        train__steps=steps,
        train__warmup=0,
        train__lr=2e-3,  # small enough that rounding does not grow over 60 steps
        save__every=0,
        engine={"start_timeout_minutes": 1.5, "timeout_minutes": 1.5},
    )


def submit_script(
    slurm: Slurm,
    run: SmallRun,
    script: str,
    tasks_per_node: int,
    *,
    python: str = sys.executable,
    options: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> tuple[str, Path]:
    """Submit a shipped script with small numbers; gives the job and its output file."""
    out = run.directory.parent / "job.out"
    size = [f"--ntasks-per-node={tasks_per_node}", f"--gpus-per-node={tasks_per_node}"]
    job = slurm.call(
        *("sbatch", "--parsable", *size, "--cpus-per-task=1", f"--chdir={ROOT}", *options),
        *(f"--output={out}", str(ROOT / "launch" / "slurm" / script), str(run.config), *overrides),
        env={"PYTHON": python, "DIST_PEFT_ROOT": str(ROOT)},
    )
    return job.strip(), out


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[float]]]:
    """Losses of one process, by number of steps."""
    found = {}
    for steps in (3, 60):
        directory = tmp_path_factory.mktemp("reference")
        assert train_from_config(parse_config(small_tree(directory, steps)), World()) == 0
        found[steps] = losses(directory / "run")
    return found


@pytest.fixture
def small_run(tmp_path: Path, reference: dict[int, list[float]]) -> SmallRun:
    config = save_config(tmp_path, small_tree(tmp_path, 3))
    return SmallRun(config, tmp_path / "run", reference[3])


@pytest.fixture
def long_run(tmp_path: Path, reference: dict[int, list[float]]) -> SmallRun:
    config = save_config(tmp_path, small_tree(tmp_path, 60))
    return SmallRun(config, tmp_path / "run", reference[60])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two SLURM nodes."""
    need("ip", "slurmctld", "slurmd", "sbatch")
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
