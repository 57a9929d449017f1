import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from dist_peft.core.log import close_log
from dist_peft.quant import cpu_products
from tests.support.curves import skip_curves
from tests.support.shared_files import locate_shared_data
from tests.support.small_disk import explain_no_disk, mount_small_disk
from tests.support.tiers import (  # noqa: F401
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_terminal_summary,
)

# as an entry point does, for forked processes, which find torch loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# a busy machine is no defect
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


LONGEST_FIRST = (
    "app/test_matrix.py",
    "app/test_equality.py",
    "launch/test_slurm.py",
    "launch/test_deepspeed.py",
    "launch/test_torchrun.py",
    "app/test_resume.py",
    "app/test_qalora.py",
    "test_engineering.py",
    "app/commands/test_quickstart.py",
    "app/test_quality.py",
    "app/test_classification.py",
    "app/test_full.py",
    "app/test_experts.py",
    "app/test_fusion.py",
    "engine/test_every_row_learns.py",
)
"""Files that take long, the longest first."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: where workers get whole files in this order
    (``--dist loadfile --no-loadscope-reorder``), none is left alone with one at the end."""
    tests = Path(__file__).parent
    ranks = {tests / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """What was imported stays: collections need not look at half a million objects each time, nor
    come after every 700 new ones."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    _let_torch_loggers_propagate()


def _let_torch_loggers_propagate() -> None:
    """The loggers below ``torch`` (about 80) write through it, not each to stderr by itself.

    Thus ``caplog`` is attached to ``torch`` alone: pytest attaches two handlers to each logger that
    does not propagate, three times a test.
    """
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True
            logger.handlers.clear()


@pytest.fixture(autouse=True)
def _log_is_closed() -> Iterator[None]:
    """A test that sets the log up leaves it as it was, or the next one captures nothing."""
    yield
    close_log()


@pytest.fixture(scope="session", autouse=True)
def _hangup_is_not_ignored() -> None:
    """Under ``nohup`` it is, and the program leaves it so."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> Iterator[None]:
    """Only tests that look at the curves of a report draw them."""
    with skip_curves():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data and the stories260K model; set DIST_PEFT_DATA to move it."""
    directory = locate_shared_data()
    if not directory.is_dir():
        pytest.skip(f"no data directory {directory} (set DIST_PEFT_DATA)")
    return directory


@pytest.fixture
def native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit products as ``transformers`` computes them, on processors without instructions too."""
    monkeypatch.setattr(cpu_products, "_is_native_product_fast", lambda dtype: True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 256 KiB, to be filled; skips where none can be mounted."""
    if (reason := explain_no_disk()) is not None:
        pytest.skip(reason)
    place = tmp_path / "disk"
    place.mkdir()
    with mount_small_disk(place, 2**18):
        yield place
