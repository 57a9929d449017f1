"""A directory appears complete or not at all."""

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from dist_peft.core.errors import UserError
from dist_peft.store.publish import check_output_free, publish_directory
from dist_peft.store.writer import write_atomically
from tests.support.small_disk import BALLAST, fill_disk


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def publish(out: Path, text: str = "new") -> None:
    with publish_directory(out) as partial:
        file = out / "config.json"
        assert not file.exists() or file.read_text() != text
        (partial / "below").mkdir()
        (partial / "below" / "a").write_text(text)
        (partial / "config.json").write_text(text)


def test_it_appears_with_one_rename(tmp_path: Path) -> None:
    publish(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "below" / "a").read_text() == "new"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    publish(tmp_path / "link")
    assert (tmp_path / "empty" / "config.json").read_text() == "new"


def test_an_older_one_is_replaced_as_a_whole(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    (tmp_path / "out" / "more").touch()
    publish(tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["below", "config.json"]


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("target", ["kept", "new/out"])
def test_nothing_is_left_of_a_full_disk(tmp_path: Path, at: int, target: str) -> None:
    """The disk is full at the ``at``-th write that reaches it, up to that of the last rename."""
    publish(tmp_path / "kept", "old")
    calls = iter(range(99))

    def fail_in_time(descriptor: int) -> None:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write() -> None:
        with publish_directory(tmp_path / target) as partial:
            for name in ("config.json", "b"):
                write_atomically(partial / name, "new")

    with (
        mock.patch("os.fsync", fail_in_time),
        pytest.raises(UserError, match=rf"disk full while writing {tmp_path / target}"),
    ):
        write()
    assert next(calls) == at + 1
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "config.json").read_text() == "old"


@pytest.mark.parametrize("target", ["kept", "new/out"])
def test_a_disk_that_is_full_at_any_write(small_disk: Path, target: str) -> None:
    """With one page more each time, until the output fits."""
    publish(small_disk / "kept", "old" * 3000)

    def publish_on_full_disk(pages: int) -> str:
        fill_disk(small_disk, pages * mmap.PAGESIZE)
        try:
            publish(small_disk / target, "new" * 3000)
        except (UserError, OSError) as error:
            left = sorted(set(names(small_disk)) - {BALLAST, "kept"})
            kept = (small_disk / "kept" / "config.json").read_text() == "old" * 3000
            return f"{error}; kept {kept}, left {left}"
        finally:
            (small_disk / BALLAST).unlink()
        return ""

    errors = list(iter(map(publish_on_full_disk, range(32)).__next__, ""))
    assert len(errors) >= 3
    for text in errors:
        assert ("disk full" in text or "No space" in text) and text.endswith("kept True, left []")
    assert (small_disk / target / "config.json").read_text() == "new" * 3000
    assert not list(small_disk.rglob(".*"))


def test_messages_name_the_output(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"^{tmp_path}/out/x is wrong$"),
        publish_directory(tmp_path / "out") as partial,
    ):
        raise UserError(f"{partial}/x is wrong")
    assert not names(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_peft.store.publish import publish_directory
with publish_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("x")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.e2e
def test_a_killed_one_is_repeated_and_a_living_one_is_not_disturbed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    with pytest.raises(UserError, match=f"another process is writing {out}"):
        publish(out)
    assert names(tmp_path / ".out.partial") == ["half"]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert names(tmp_path) == [".out.partial"]
    publish(out)
    assert names(tmp_path) == ["out"] and names(out) == ["below", "config.json"]


def test_killed_between_the_renames(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(KeyboardInterrupt), publish_directory(tmp_path / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_what_may_be_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    check_output_free(out)
    out.mkdir()
    check_output_free(out)
    (out / "notes").touch()
    with pytest.raises(UserError, match=r"--overwrite$"):
        check_output_free(out)
    with pytest.raises(UserError, match=r"holds neither config\.json nor adapter_config\.json"):
        check_output_free(out, overwrite=True)
    (out / "config.json").touch()
    check_output_free(out, overwrite=True)
    with pytest.raises(UserError, match=rf"would remove {out}, which contains {out}/base"):
        check_output_free(out, overwrite=True, inputs=(out / "base",))
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="would remove"):
        check_output_free(out, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_output_free(out / "notes", overwrite=True)
