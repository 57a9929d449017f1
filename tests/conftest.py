import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from dist_peft.core.log import close_log

# a busy machine is no defect
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _log_is_closed() -> Iterator[None]:
    """A test that sets the log up leaves it as it was, or the next one captures nothing."""
    yield
    close_log()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data and the stories260K model; set DIST_PEFT_DATA to move it."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    directory = Path(os.environ.get("DIST_PEFT_DATA", default))
    if not directory.is_dir():
        pytest.skip(f"no data directory {directory} (set DIST_PEFT_DATA)")
    return directory
