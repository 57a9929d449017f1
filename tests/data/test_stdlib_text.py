"""Which sources are taken: deterministic, readable, without tests and packages."""

from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.stdlib_text import read_stdlib


def test_real_installation() -> None:
    files = read_stdlib()
    names = [f.name for f in files]
    assert names == sorted(names)
    assert sum(len(f.text) for f in files) > 1_000_000
    assert 0 < sum(f.held_out for f in files) < len(files) / 3
    assert not any({"test", "tests", "site-packages"} & set(n.split("/")) for n in names)
    assert files == read_stdlib()


def test_budget_and_choice_follow_from_names(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"m{number}.py").write_text(f"# module {number}\n" + "x = 1\n" * 100)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("y = 2\n" * 200)
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe" * 400)
    everything = read_stdlib(tmp_path)
    assert len(everything) == 20
    some = read_stdlib(tmp_path, max_chars=3000)
    assert 0 < sum(len(f.text) for f in some) <= 3000
    assert set(some) <= set(everything)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_stdlib(tmp_path)
