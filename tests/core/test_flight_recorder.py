"""torch's flight recorder on two ranks."""

import pickle
from pathlib import Path

import pytest

from dist_peft.core.flight_recorder import dump_flight_recorder
from dist_peft.core.world import World
from tests.support.dist import run_ranks


def _record(world: World, directory: Path) -> list[str]:
    world.barrier()
    file = directory / f"flight_recorder_{world.rank}"
    assert dump_flight_recorder(file)
    entries = pickle.loads(file.read_bytes())["entries"]
    return [entry["profiling_name"] for entry in entries]


@pytest.mark.dist
def test_collectives_are_recorded(tmp_path: Path) -> None:
    for names in run_ranks(_record, 2, tmp_path):
        assert "gloo:all_reduce" in names


def test_one_process_has_recorded_none(tmp_path: Path) -> None:
    assert not dump_flight_recorder(tmp_path / "x") and not list(tmp_path.iterdir())
