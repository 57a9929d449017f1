"""A run directory: what cannot be one is refused without a change, and its files."""

import logging
import os
from pathlib import Path

import pytest

from dist_peft.app.run_directory import (
    check_run_directory_writable,
    open_run_directory,
    write_run_config,
)
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


def test_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"save\.dir .*file is a file; give a directory"):
        check_run_directory_writable(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write run directory .*: .*file is a file"):
        check_run_directory_writable(tmp_path / "file" / "a" / "run")
    check_run_directory_writable(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission to write"):
        check_run_directory_writable(tmp_path / "run")


def test_log_and_configuration(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path))
    run_dir = tmp_path / "a" / "run"
    open_run_directory(run_dir, World())
    logging.getLogger("dist_peft").warning("a line")
    write_run_config(run_dir, config)
    close_log()
    assert "a line" in (run_dir / "log.txt").read_text()
    assert load_config(run_dir / "config.yaml") == config
    with pytest.raises(UserError, match="cannot write run directory"):
        open_run_directory(run_dir / "log.txt" / "below", World())
    close_log()
