"""Scripts for AdapterHub's library, which needs a Python of its own."""

import os
import subprocess
from typing import Any

import pytest


def adapterhub(*command: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in the Python that has AdapterHub's library."""
    python = os.environ.get("DIST_PEFT_ADAPTERS_PYTHON")
    if python is None:
        pytest.skip("DIST_PEFT_ADAPTERS_PYTHON names no Python with adapters 1.3")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [python, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
