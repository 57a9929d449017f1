"""The lowest transformers that is allowed is the one that ``.ci/run lowest`` tries."""

import os
import re
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import transformers

ROOT = Path(__file__).parents[1]


def read_pins() -> dict[str, str]:
    """Version by library of ``.ci/lowest.txt``."""
    return dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / ".ci/lowest.txt").read_text(), re.MULTILINE))


def test_the_pin_is_the_bound_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(
        re.findall(r"^([\w-]+)>=(\S+)$", "\n".join(package["dependencies"]), re.MULTILINE)
    )
    pins = read_pins()
    assert pins["transformers"] == bounds["transformers"]
    assert int(pins["huggingface_hub"].split(".")[0]) == int(
        bounds["huggingface_hub"].split(".")[0]
    )


def test_the_script_installs_the_pins_and_runs_models_adapters_and_the_main_job() -> None:
    script = (ROOT / ".ci/run").read_text()
    last = script[script.index("rm -rf .venv/lowest") :]
    assert (
        "--no-deps" in last and "-r .ci/lowest.txt" in last and "DIST_PEFT_LOWEST=required" in last
    )
    assert '-m "main_job or not (dist or e2e or launcher)"' in last
    paths = re.findall(r"\btests/[\w/.]+", last)
    assert {"tests/model", "tests/adapters", "tests/app/commands/test_quickstart.py"} < set(paths)
    assert all((ROOT / path).exists() for path in paths)


@pytest.mark.skipif("DIST_PEFT_LOWEST" not in os.environ, reason="in .ci/run lowest only")
def test_these_tests_run_with_the_pins() -> None:
    found = {
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
    }
    assert found == read_pins()
