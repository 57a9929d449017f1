"""The shipped configurations fit the cards that their names promise, with 2 GiB to spare."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.io import load_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from plan_configs import list_configs, plan_config, read_promised_cluster  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "plan_configs.json"


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text())["result"]
    return found


@pytest.mark.parametrize("path", list_configs(), ids=lambda path: path.stem)
def test_fits_its_cards_and_says_how(path: Path, planned: dict[str, Any]) -> None:
    known = planned[path.stem]
    assert known["config"] == load_config(path, []).model_dump(mode="json"), "plan it again"
    limit = read_promised_cluster(path).gpu_memory
    assert known["needed"] + known["spare"] == limit
    assert known["needed"] == sum(known["items"].values()) <= limit - 2 * 2**30
    stated = re.search(r"([\d.]+) GiB needed", path.read_text())
    assert stated is not None and float(stated[1]) == round(known["needed"] / 2**30, 1)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["llama3_8b_qlora_1x24gb"])
def test_is_planned_as_committed(name: str, planned: dict[str, Any]) -> None:
    plan = plan_config(ROOT / "configs" / f"{name}.yaml")
    assert plan.memory.total == pytest.approx(planned[name]["needed"], rel=0.005)
