from pathlib import Path

import pytest

from dist_peft.app.sweep.sweep_file import SweepFile, check_directory_kind, open_sweep_file
from dist_peft.core.config.run import SweepPoint
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

POINTS = {"point-000": SweepPoint(lr=1e-3), "point-001": SweepPoint(lr=1e-4, r=3)}


def test_states_are_read_again(tmp_path: Path) -> None:
    file = SweepFile(tmp_path, POINTS)
    file.set_halved(["point-001"], 4)
    file.set_state("point-000", "failed", 7, "not finite")
    found = SweepFile(tmp_path, POINTS)
    assert found.rung == 4 and found.points == file.points
    assert found.points["point-001"].state == "halved" and found.points["point-001"].step == 4
    assert found.points["point-001"].values == {"lr": 1e-4, "r": 3}
    new = SweepFile(tmp_path, POINTS, is_new=True)
    assert new.rung == 0 and new.points["point-000"].state == "running"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    SweepFile(tmp_path, POINTS, is_writer=False).set_state("point-000", "finished", 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"points": []}', '{"rung": 0, "points": [{"x": 1}]}'])
def test_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json is damaged .* remove it"):
        SweepFile(tmp_path, POINTS)


def test_point_with_other_values_is_refused(tmp_path: Path) -> None:
    first = {"point-000": SweepPoint(lr=1e-3), "point-001": SweepPoint(lr=1e-2)}
    open_sweep_file(tmp_path, first, True, World()).write()
    more = {**first, "point-002": SweepPoint(seed=1)}
    assert len(open_sweep_file(tmp_path, more, False, World()).points) == 3
    changed = {**first, "point-001": SweepPoint(r=4)}
    with pytest.raises(UserError, match=r"point-001 was trained with lr 0.01, and now has r 4"):
        open_sweep_file(tmp_path, changed, False, World())
    assert open_sweep_file(tmp_path, changed, True, World()).points["point-001"].values == {"r": 4}


def test_directory_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    for is_sweep in (True, False):
        check_directory_kind(tmp_path, is_sweep)
    (tmp_path / "sweep.json").touch()
    check_directory_kind(tmp_path, is_sweep=True)
    with pytest.raises(UserError, match="holds a sweep"):
        check_directory_kind(tmp_path, is_sweep=False)
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "metrics.jsonl").touch()
    check_directory_kind(tmp_path, is_sweep=False)
    with pytest.raises(UserError, match="a run without a sweep"):
        check_directory_kind(tmp_path, is_sweep=True)
