"""The workspace that commands get, and a place for a copy of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.case import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("bad_input") / "workspace")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "w"
    shutil.rmtree(tmp_path / "w", ignore_errors=True)
