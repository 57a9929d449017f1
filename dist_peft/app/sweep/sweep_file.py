"""``sweep.json`` of a sweep: its points, their values, and how far they have come.

::

    RUN/config.yaml, log.txt   of the sweep
    RUN/sweep.json             this file
    RUN/ranking.json           points by held-out loss, at the end
    RUN/report.html            their curves and tables
    RUN/point-000/             an ordinary run: config.yaml, adapter/, checkpoints/, metrics.jsonl

A point's ``config.yaml`` is that of a run of its adapter alone. So everything that reads a run
directory also reads a point's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dist_peft.core.config.run import SweepPoint
from dist_peft.core.errors import UserError
from dist_peft.core.text_exchange import broadcast_text
from dist_peft.core.world import World
from dist_peft.store.writer import write_atomically

__all__ = [
    "PointRecord",
    "PointState",
    "SweepFile",
    "check_directory_kind",
    "describe_values",
    "open_sweep_file",
]

PointState = Literal["running", "finished", "halved", "failed"]
"""halved: stopped by ``sweep.halving``. failed: its loss or gradient was not finite."""


@dataclass
class PointRecord:
    """A point of a sweep.

    Attributes:
        run: its directory in that of the sweep.
        values: that it has in place of those of the configuration.
        step: steps done when it ended.
        reason: why it failed.
    """

    run: str
    values: dict[str, Any]
    state: PointState = "running"
    step: int = 0
    reason: str = ""


class SweepFile:
    """The records of the points by name; written by the first rank."""

    def __init__(
        self,
        run_dir: Path,
        points: Mapping[str, SweepPoint],
        *,
        is_new: bool = False,
        stored: str | None = None,
        is_writer: bool = True,
    ) -> None:
        """Read the file if it exists.

        Args:
            is_new: no point is resumed: an earlier file does not count.
            stored: contents of the file, empty without one; None: it is read.
            is_writer: false: changes stay in memory, as another rank writes the same ones.

        Raises:
            UserError: it is damaged, or a point of the same name has other values.
        """
        self.path, self._is_writer = run_dir / "sweep.json", is_writer
        values = {
            name: point.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
            for name, point in points.items()
        }
        self.points = {name: PointRecord(name, own) for name, own in values.items()}
        self.rung = 0
        """The last step after which ``sweep.halving`` has chosen."""
        stored = self.read_text() if stored is None else stored
        if is_new or not stored:
            return
        try:
            tree = json.loads(stored)
            found = {record["run"]: PointRecord(**record) for record in tree["points"]}
            self.rung = int(tree["rung"])
        except (ValueError, LookupError, TypeError) as error:
            raise _make_damage_error(self.path, error) from None
        for name, record in self.points.items():
            if name in found and found[name].values != record.values:
                raise UserError(
                    f"{self.path}: {name} was trained with {_show(found[name].values)}, and now "
                    f"has {_show(record.values)}; write further points after those before, or use "
                    "another save.dir, or resume: never to start over"
                )
            self.points[name] = found.get(name, record)

    def read_text(self) -> str:
        """Return the contents of the file; empty without one. Raises UserError if unreadable."""
        try:
            return self.path.read_text() if self.path.is_file() else ""
        except (OSError, ValueError) as error:
            raise _make_damage_error(self.path, error) from None

    def set_halved(self, names: Sequence[str], rung: int) -> None:
        """Record that halving has stopped some points after step ``rung``, and write the file."""
        for name in names:
            record = self.points[name]
            record.state, record.step = "halved", rung
        self.rung = rung
        self.write()

    def set_state(self, name: str, state: PointState, step: int, reason: str = "") -> None:
        """Change the record of a point and write the file."""
        record = self.points[name]
        record.state, record.step, record.reason = state, step, reason
        self.write()

    def write(self) -> None:
        """Write the file."""
        if not self._is_writer:
            return
        points = [asdict(record) for record in self.points.values()]
        tree = {"rung": self.rung, "points": points}
        write_atomically(self.path, json.dumps(tree, indent=1) + "\n")


def _show(values: Mapping[str, Any]) -> str:
    return describe_values(values) or "no values of its own"


def describe_values(values: Mapping[str, Any]) -> str:
    """Return the values of a point in one line, data by their paths."""
    shown = {
        key: " + ".join(str(source["path"]) for source in value) if key == "data" else value
        for key, value in values.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def open_sweep_file(
    run_dir: Path, points: Mapping[str, SweepPoint], is_new: bool, world: World
) -> SweepFile:
    """Return the file's records, the same on every rank. Collective.

    Raises:
        UserError: on every rank: it is damaged, or a point has other values there.
    """
    stored = ""
    with world.raise_together("read sweep.json"):
        if world.is_first:
            stored = SweepFile(run_dir, points, is_new=True).read_text()
    stored = broadcast_text(stored)
    with world.raise_together("read sweep.json"):
        return SweepFile(run_dir, points, is_new=is_new, stored=stored, is_writer=world.is_first)


def check_directory_kind(run_dir: Path, is_sweep: bool) -> None:
    """Check that ``save.dir`` holds no run of the other kind.

    Raises:
        UserError: a sweep would be written into an ordinary run, or a run into a sweep.
    """
    if is_sweep and any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise UserError(
            f"save.dir {run_dir} holds a run without a sweep; choose another for the sweep, or "
            "leave out sweep to resume the run"
        )
    if not is_sweep and (run_dir / "sweep.json").exists():
        raise UserError(
            f"save.dir {run_dir} holds a sweep; give its sweep section to resume it, or choose "
            "another save.dir"
        )


def _make_damage_error(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged ({error}); remove it: points resume from their checkpoints"
    )
