"""``train.tasks: separate``: one adapter per training source, each in a separate run directory.

::

    RUN/config.yaml, log.txt   of all tasks
    RUN/tasks.json             finished tasks with their final metrics
    RUN/report.html            the same as a page
    RUN/tasks/NAME/            an ordinary run: config.yaml, adapter/, checkpoints/, metrics.jsonl

A task's ``config.yaml`` is that of a run with this source alone, and such a run produces the same
numbers. So everything that reads a run directory also reads a task's.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_peft.core.config.io import load_run_config
from dist_peft.core.config.run import FullConfig, LoraConfig, PartialConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.store.writer import write_atomically
from dist_peft.train.report import write_task_report
from dist_peft.train.run_summary import RunSummary
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics

__all__ = [
    "TasksFile",
    "check_task_config",
    "list_point_runs",
    "list_task_runs",
    "refuse_separate_tasks",
    "refuse_sweep",
]


def check_task_config(config: RunConfig) -> None:
    """Check that ``config`` describes separate tasks.

    Raises:
        UserError: it does not; names the key and the fix.
    """

    def raise_user_error(reason: str) -> None:
        raise UserError(f"train.tasks is separate, but {reason}")

    sources, seen = config.data.train, set[str]()
    if len(sources) < 2:
        raise_user_error("data.train has one source; name one a task, or set train.tasks: mixed")
    if config.data.mixing != "joined":
        raise_user_error(
            f"data.mixing is {config.data.mixing}, which draws the rows of one run from several "
            "sources; leave it out, or set train.tasks: mixed"
        )
    if config.data.val_split:
        raise_user_error(
            "data.val_split keeps equal records of all sources on one side, which tasks trained "
            "one by one cannot; name held-out files in data.eval"
        )
    for number, source in enumerate(sources):
        if not re.fullmatch(r"\w[\w.+-]*", source.task_name):
            raise_user_error(
                f"the name of data.train[{number}], {source.task_name!r}, cannot be a "
                "directory's; set "
                "its name to letters, digits, '-', '_', '.' or '+'"
            )
        if source.task_name in seen:
            raise_user_error(
                f"two sources of data.train are called {source.task_name}; set their name"
            )
        seen.add(source.task_name)
    if len({len(source.labels) for source in sources}) > 1:
        numbers = ", ".join(f"{source.task_name} {len(source.labels)}" for source in sources)
        raise_user_error(
            f"tasks have different numbers of labels ({numbers}), so their heads differ in shape; "
            "train tasks of one number together"
        )
    if isinstance(config.adapter, LoraConfig) and config.adapter.uses_training_data:
        raise_user_error(
            f"adapter.init {config.adapter.init} reads the training data, and all tasks start from "
            "one initialization; set another adapter.init, or run the tasks one by one"
        )
    if isinstance(config.adapter, FullConfig | PartialConfig):
        raise_user_error(
            f"adapter.kind {config.adapter.kind} trains weights of the base, and the next task "
            "would start from the weights that the previous one trained; run the tasks one by one, "
            "or train adapters"
        )
    if config.resume not in ("auto", "never"):
        raise_user_error(
            "resume names a checkpoint, which is of one task; set it to auto (each task resumes "
            "from its newest one) or never"
        )
    names = [source.task_name for source in sources]
    for number, source in enumerate(config.data.eval):
        if source.task_name not in names:
            raise UserError(
                f"data.eval[{number}] is of task {source.task_name}, which data.train does "
                "not have "
                f"({', '.join(names)}); with train.tasks: separate give held-out and training "
                "source of a task the same name"
            )


# -- run directories -------------------------------------------------------------------------------


def list_task_runs(run_dir: Path) -> dict[str, Path]:
    """Return the run directory of each started task by name; empty for an ordinary run.

    Raises:
        UserError: ``config.yaml`` is damaged.
    """
    if not (run_dir / "tasks").is_dir() or not (run_dir / "config.yaml").is_file():
        return {}
    # safe: only task names are read from it, and no file or code of the base is opened
    config = load_run_config(run_dir / "config.yaml", trust_remote_code=True)
    names = [source.task_name for source in config.data.train]
    runs = {name: run_dir / "tasks" / name for name in names}
    return {name: run for name, run in runs.items() if (run / "config.yaml").is_file()}


def list_point_runs(run_dir: Path) -> list[Path]:
    """Return the run directory of each started point of a sweep; none of an ordinary run."""
    return [file.parent for file in sorted(run_dir.glob("point-*/config.yaml"))]


def refuse_sweep(run_dir: Path) -> None:
    """Refuse a sweep, for commands that handle one adapter at a time.

    Raises:
        UserError: ``run_dir`` is a sweep.
    """
    if points := list_point_runs(run_dir):
        raise UserError(
            f"{run_dir} is a sweep with an adapter for each of its points; this takes one at a "
            f"time: --run {points[0]} (ranking.json has the best)"
        )


def refuse_separate_tasks(run_dir: Path) -> None:
    """Refuse a run of several adapters, for commands that handle one at a time.

    Raises:
        UserError: ``run_dir`` is a run of separate tasks, or a sweep.
    """
    refuse_sweep(run_dir)
    if runs := list_task_runs(run_dir):
        first = next(iter(runs.values()))
        raise UserError(
            f"{run_dir} has an adapter for each of its tasks; this takes one at a time: "
            f"--run {first}"
        )


class TasksFile:
    """``tasks.json``: the tasks that are finished, each with its steps and last losses."""

    def __init__(self, run_dir: Path) -> None:
        """Read the file if it exists; raises UserError if it is damaged."""
        self.run_dir, self.path = run_dir, run_dir / "tasks.json"
        self.tasks: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.tasks = dict(json.loads(self.path.read_text())["tasks"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"{self.path} is damaged ({error}); remove it: tasks resume from their "
                    "checkpoints"
                ) from None

    def get_finished_steps(self, name: str) -> int:
        """Return the number of steps of a finished task; 0 if it is not finished."""
        return int(self.tasks.get(name, {}).get("steps", 0))

    def mark_started(self, name: str) -> None:
        """Mark the task as running: remove its record, which is outdated."""
        if self.tasks.pop(name, None) is not None:
            self._write_tasks_file()

    def mark_finished(self, name: str, summary: RunSummary) -> None:
        """Record the final metrics of a task and write the report of all tasks."""
        records = self._read_task_metrics(name)
        first, last = vars(records[0]), vars(records[-1])
        found = {
            "loss": last["loss"],
            **{key: first[key] for key in first if key.endswith("_before")},
            **{k: last[k] for k in last if k.startswith("eval_") and not k.endswith("_before")},
        }
        known = {key: value for key, value in found.items() if value not in (None, {})}
        self.tasks[name] = {"run": f"tasks/{name}", "steps": last["step"], **known}
        self._write_tasks_file()
        write_task_report(self.run_dir, summary, self._read_all_metrics())

    def _read_task_metrics(self, name: str) -> list[StepMetrics]:
        return read_metrics(self.run_dir / "tasks" / name / METRICS_FILE)

    def _read_all_metrics(self) -> Mapping[str, list[StepMetrics]]:
        return {name: self._read_task_metrics(name) for name in self.tasks}

    def _write_tasks_file(self) -> None:
        write_atomically(self.path, json.dumps({"tasks": self.tasks}, indent=1) + "\n")
