"""Where the real data and the stories260K model lie."""

import os
from pathlib import Path


def locate_shared_data() -> Path:
    """Return the directory of real data, which may not exist; DIST_PEFT_DATA moves it."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return Path(os.environ.get("DIST_PEFT_DATA", default))
