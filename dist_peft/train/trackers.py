"""Experiment trackers that people look at: Weights & Biases, MLflow, Trackio.

Each is a sink of metrics (``train.metric_sinks``) with its own library, imported on rank 0 when it
is asked for (``save.track``). Servers, projects and keys come from the environment that each
library documents (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ...); nothing of them is in the
configuration. ``trackers.json`` in the run directory keeps the ids, so that a resumed run adds to
the same one.

A tracker never ends a training: its first error is a warning, and it gets no more steps.
"""

import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_peft.core.errors import UserError
from dist_peft.store.writer import write_atomically
from dist_peft.train.metric_sinks import MetricSink, list_scalars
from dist_peft.train.step_metrics import StepMetrics

__all__ = ["TRACKERS", "check_trackers_installed", "list_tracker_sinks"]

log = logging.getLogger("dist_peft")

IDS_FILE = "trackers.json"
_PROJECT = "dist_peft"
_LONGEST_PARAMETER = 500  # characters, MLflow's limit


class _Tracker(Protocol):
    """A run of a tracker's library."""

    run_id: str

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class _WandbRun:
    def __init__(self, name: str, config: Mapping[str, Any], run_id: str | None, directory: Path):
        import wandb

        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            reinit="create_new",  # points of a sweep have runs at the same time
            dir=str(directory),
            config=dict(config),
        )
        self.run_id = str(self._run.id)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._run.finish()


class _MlflowRun:
    def __init__(self, name: str, config: Mapping[str, Any], run_id: str | None, directory: Path):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run_id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            known = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if known is None else known
            experiment_id = number if isinstance(number, str) else number.experiment_id
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            self._client.log_batch(
                run_id,
                params=[
                    Param(key, str(value)[:_LONGEST_PARAMETER])
                    for key, value in _flatten(config).items()
                ],
            )
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(key, value, now, step) for key, value in scalars.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self.run_id)


class _TrackioRun:
    def __init__(self, name: str, config: Mapping[str, Any], run_id: str | None, directory: Path):
        import trackio

        self._library = trackio
        self.run_id = run_id or name
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=self.run_id,
            config=_flatten(config),
            resume="allow",
        )

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._library.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._library.finish()


TRACKERS: Mapping[str, Callable[[str, Mapping[str, Any], str | None, Path], _Tracker]] = {
    "wandb": _WandbRun,
    "mlflow": _MlflowRun,
    "trackio": _TrackioRun,
}
"""Values of ``save.track``, which are the names of the libraries too."""


class TrackerSink:
    """Sends each step to one tracker."""

    def __init__(
        self, tracker: str, name: str, config: Mapping[str, Any], run_dir: Path, first_step: int
    ) -> None:
        """Begin a run of the tracker, or continue the one of ``trackers.json``.

        Args:
            tracker: a name of ``TRACKERS``.
            name: of the run, for people.
            config: of the run, without secrets.
            run_dir: has ``trackers.json``.
            first_step: steps done before; 0 begins a run.
        """
        self._tracker, self._run = tracker, None
        file = run_dir / IDS_FILE
        ids = _read_ids(file)
        known = ids.get(tracker) if first_step else None
        try:
            self._run = TRACKERS[tracker](name, config, known, run_dir)
        except Exception as error:  # of any library, its server or the network
            self._give_up(error)
        else:
            write_atomically(file, json.dumps({**ids, tracker: self._run.run_id}) + "\n")

    _run: _Tracker | None

    def write_step(self, record: StepMetrics) -> None:
        """Send the scalars of a step; those before training under the step before."""
        if self._run is None:
            return
        by_step: dict[int, dict[str, float]] = {}
        for key, value, step in list_scalars(record):
            by_step.setdefault(step, {})[key] = value
        try:
            for step in sorted(by_step):
                self._run.log_scalars(by_step[step], step)
        except Exception as error:  # of any library, its server or the network
            self._give_up(error)

    def close(self) -> None:
        """Let the tracker send the rest."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # of any library, its server or the network
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning(
            "%s gets no more metrics of this run (%s: %s); metrics.jsonl has all of them",
            self._tracker,
            type(error).__name__,
            error,
        )


def list_tracker_sinks(
    trackers: Sequence[str], run_dir: Path, config: Mapping[str, Any]
) -> list[Callable[[Path, int], MetricSink]]:
    """Return a maker of the sink of each tracker of ``save.track``, for ``MetricsWriter``."""
    path = run_dir.resolve()
    is_point = (path.parent / "sweep.json").is_file()
    name = f"{path.parent.name}/{path.name}" if is_point else path.name

    def make(tracker: str) -> Callable[[Path, int], MetricSink]:
        return lambda directory, step: TrackerSink(tracker, name, config, directory, step)

    return [make(tracker) for tracker in trackers]


def check_trackers_installed(trackers: Sequence[str]) -> None:
    """Check that the libraries of ``save.track`` can be imported.

    Raises:
        UserError: names one that is not installed.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"save.track: {tracker} is not installed; pip install {tracker}, or leave it out"
            )


def _read_ids(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as ``{"train.lr": ...}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
