import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.curves import skip_curves
from tests.support.shared_files import locate_shared_data
from tests.support.small_disk import explain_no_disk, mount_small_disk
from tests.support.tiers import (  # noqa: F401
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_terminal_summary,
)
from tests.support.turns import keep_present_turn, pytest_report_header  # noqa: F401

# torch is imported by the tests only: the process that deals tests to workers needs none, and
# workers begin two seconds earlier
# as an entry point does, for forked processes, which find torch loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# kernels are interpreted where no GPU is; Triton reads this once, when it is first imported
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# a busy machine is no defect
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


LONGEST_FIRST = (
    "app/test_matrix.py",
    "app/test_equality.py",
    "app/test_resume.py",
    "bad_input/test_bad_input.py",
    "launch/test_deepspeed.py",
    "plan/test_run_plan.py",
    "app/test_qalora.py",
    "launch/test_slurm.py",
    "launch/test_torchrun.py",
    "test_engineering.py",
    "app/test_experts.py",
    "app/commands/test_quickstart.py",
    "engine/test_every_row_learns.py",
    "app/test_classification.py",
    "app/test_full.py",
    "faults/test_campaign.py",
    "app/test_quality.py",
    "app/test_fusion.py",
    "train/test_nonfinite.py",
    "engine/test_zero.py",
    "app/test_base_content.py",
    "export/formats/test_kept_nf4.py",
    "launch/test_mpi.py",
    "engine/test_outer_units.py",
    "engine/test_fsdp2.py",
    "quickstart/test_tiny_model.py",
    "quant/test_codec.py",
    "fuzz/test_safetensors_header.py",
    "core/config/test_io.py",
    "train/test_plots.py",
    "export/formats/test_registry.py",
    "data/test_record_blocks.py",
    "export/test_peft_form.py",
    "quant/test_frozen_matmul.py",
    "export/test_merge_weights.py",
)
"""Files that take long, the longest first; those of the unit tier come last, in the same order."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests whose turn it is not are left out. Files that take long come first: where workers get
    whole files in this order (``--dist loadfile --no-loadscope-reorder``), none is left alone with
    one at the end."""
    tests = Path(__file__).parent
    ranks = {tests / name: number for number, name in enumerate(LONGEST_FIRST)}
    keep_present_turn(config, items)
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collectstart() -> None:
    """Imports make half a million objects, and garbage only that waits for their end."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What was imported stays: collections need not look at half a million objects each time, nor
    come after every 700 new ones."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
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
    from dist_peft.core.log import close_log

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


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An executable in place of ``python``, for ranks that need not import for five seconds."""
    from tests.support.forked_python import serve_forked_python

    with serve_forked_python(tmp_path_factory.mktemp("forked")) as program:
        yield program


@pytest.fixture
def native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit products as ``transformers`` computes them, on processors without instructions too."""
    from dist_peft.quant import cpu_products

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
