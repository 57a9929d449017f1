"""What rank 0 and the others show, in which place."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from dist_peft.core.errors import UserError
from dist_peft.core.log import (
    FILE_ONLY,
    ONCE,
    close_log,
    is_quiet,
    set_verbosity,
    setup_log,
    write_traceback,
)
from tests.support.small_disk import fill_disk

log = logging.getLogger("dist_peft")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    set_verbosity("normal")
    close_log()


def write_one_of_each(rank: int, directory: Path) -> None:
    setup_log(directory, rank=rank, world_size=2)
    log.debug("debugging")
    log.info("loading")
    log.info("only in the file", extra=FILE_ONLY)
    log.info("the same on all", extra=ONCE)
    log.warning("late")


def test_quiet_and_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity("quiet")
    assert is_quiet()
    write_one_of_each(0, tmp_path / "quiet")
    assert capsys.readouterr().err == "[rank 0] warning: late\n"
    lines = (tmp_path / "quiet" / "log.txt").read_text()
    assert "loading" in lines and "only in the file" in lines and "debugging" not in lines
    write_one_of_each(1, tmp_path / "quiet")
    assert capsys.readouterr().err == "[rank 1] warning: late\n"
    set_verbosity("verbose")
    assert not is_quiet()
    write_one_of_each(0, tmp_path / "verbose")
    expected = ["debugging", "loading", "the same on all", "[rank 0] warning: late"]
    assert capsys.readouterr().err.splitlines() == expected
    assert "DEBUG debugging" in (tmp_path / "verbose" / "log.txt").read_text()
    write_one_of_each(1, tmp_path / "verbose")
    expected = ["[rank 1] debugging", "[rank 1] loading", "[rank 1] warning: late"]
    assert capsys.readouterr().err.splitlines() == expected


def test_rank_0_writes_plain_lines_to_stderr_and_dated_ones_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_log(tmp_path / "new" / "run", rank=0, world_size=1)
    log.debug("hidden")
    log.info("loading %d tensors", 7)
    log.warning("slow disk")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loading 7 tensors\nwarning: slow disk\n"
    lines = (tmp_path / "new" / "run" / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO loading 7 tensors", lines[0])
    assert lines[1].endswith(" WARNING slow disk")


def test_other_ranks_show_only_warnings_with_their_rank_and_write_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_log(tmp_path, rank=3, world_size=4)
    log.info("hidden")
    log.warning("late")
    assert capsys.readouterr().err == "[rank 3] warning: late\n"
    assert not (tmp_path / "log.txt").exists()


def test_setting_up_again_neither_doubles_lines_nor_loses_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_log(None, rank=0, world_size=2)
    log.info("early")
    for _ in range(2):
        setup_log(tmp_path, rank=0, world_size=2)
        log.info("hello")
    assert capsys.readouterr().err.splitlines() == ["early", "hello", "hello"]
    assert (tmp_path / "log.txt").read_text().count("hello") == 2


def test_no_second_copy_through_the_root_logger(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        setup_log(None, rank=0, world_size=1)
        log.info("once")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err.count("once") == 1


def test_file_only_records_skip_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_log(tmp_path, rank=0, world_size=1)
    log.info("step 1", extra=FILE_ONLY)
    assert capsys.readouterr().err == ""
    assert "step 1" in (tmp_path / "log.txt").read_text()


def test_a_line_lifts_the_bar_out_of_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    setup_log(None, rank=0, world_size=1)
    with tqdm(total=3, desc="bar", mininterval=0) as bar:
        bar.update()
        log.info("between")
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert "between" in lines  # a line of its own, not glued to the bar
    assert lines[-2].startswith("bar")


def test_close_restores_the_logger_and_leaves_other_handlers(tmp_path: Path) -> None:
    foreign = logging.NullHandler()
    log.addHandler(foreign)
    try:
        setup_log(tmp_path, rank=0, world_size=1)
        assert not log.propagate
        close_log()
        close_log()
        assert log.handlers == [foreign]
        assert log.propagate
        assert log.level == logging.NOTSET
    finally:
        log.removeHandler(foreign)


def test_unwritable_directory_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(UserError, match=r"run/log\.txt.*save\.dir"):
        setup_log(tmp_path / "run", rank=0, world_size=1)


def test_what_every_rank_finds_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        setup_log(None, rank=rank, world_size=2)
        log.warning("3 records dropped", extra=ONCE)
    assert capsys.readouterr().err == "[rank 0] warning: 3 records dropped\n"


def test_held_lines_are_written_once_the_directory_is_known(tmp_path: Path) -> None:
    """A command that is refused leaves no file; one that is not has its whole log in one."""
    run = tmp_path / "run"
    setup_log(None, 0, 1, hold=True).info("before")
    setup_log(None, 0, 1, hold=True).warning("still before")
    assert not run.exists()
    setup_log(run, 0, 1).info("after")
    setup_log(run, 0, 1).info("again")
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["before", "before", "after", "again"]
    close_log()
    setup_log(None, 0, 1, hold=True).info("of a refused command")
    close_log()
    setup_log(run, 0, 1).info("of the next one")
    assert "refused" not in (run / "log.txt").read_text()


def test_a_full_disk_is_named_once_and_without_traceback(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_log(small_disk, rank=0, world_size=1)
    log.info("before")
    fill_disk(small_disk)
    for number in range(3000):
        log.info("line %d of many", number)
    close_log()
    err = capsys.readouterr().err
    assert err.count("cannot write") == 1 and "No space left on device" in err
    assert "Traceback" not in err and "Logging error" not in err


def test_secrets_are_masked_and_tracebacks_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-value")
    log = setup_log(tmp_path, 0, 1)
    log.info("reading %s", "https://me:pw@host/s3cr3t-value")
    file = write_traceback(ValueError("wrong: s3cr3t-value"), 0)
    assert file is not None and file.stat().st_mode & 0o777 == 0o600
    texts = [file.read_text(), (tmp_path / "log.txt").read_text(), capsys.readouterr().err]
    assert not any("s3cr3t" in text or "me:pw" in text for text in texts)
    assert "wrong: ***" in texts[0]
    assert all("reading https://***@host/***" in text for text in texts[1:])
