"""Two cases of ``benchmarks/fake_world.py``, and what its committed result says of the others."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from fake_world import CASES, CaseResult, run_case  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fake_world.json"


PACKED = ("deepseek-v3-fp8", "gpt-oss", "kimi")
PUBLISHED = {
    "deepseek-v3-fp8@64": 671e9,
    "gpt-oss-120b@64": 116.83e9,
    "qwen3-235b-a22b@64": 235e9,
    "llama-4-maverick@64": 400e9,
    "kimi-k2-int4@64": 1.03e12,
}
"""Parameters by the models' cards."""


def assert_case_holds(result: CaseResult, ranks: int) -> None:
    assert result.rows_sum == result.stored
    assert result.rows_most < 1.3 * result.stored / ranks + 2**20 * 40
    assert result.to_read < 1.3 * result.file_bytes / ranks + 2**20
    if result.name.startswith(PACKED):  # scales of tiles and words are fewer than packed rows'
        assert result.read is None or 0.9 < result.read / result.to_read < 1.05
    else:  # buffers of the files (DeepSeek's routers have some) are read whole by each rank
        assert result.read is None or 0 <= result.read - result.to_read < 2**16
    assert result.open_files is None or 0 < result.open_files <= min(result.files, 16)
    assert set(result.phases) >= {"forward", "head", "backward", "step"}
    assert result.gathered > 2 * 0.8 * result.stored


def test_committed_cases() -> None:
    found = {r["name"]: CaseResult(**r) for r in json.loads(RESULT.read_text())["result"]}
    ranks = {case.name: case.ranks for case in CASES}
    assert set(found) <= set(ranks) and len(found) >= 6
    for name, result in found.items():
        assert_case_holds(result, ranks[name])
        wanted = PUBLISHED.get(name, result.parameters)
        assert abs(result.parameters / wanted - 1) < 0.01, name
        assert result.read is not None or name not in PUBLISHED
        if result.peak is not None and result.kept is not None:
            assert result.kept <= result.peak < result.rows_most + 150 * 2**20


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["llama-3.1-8b@64", "llama-65b@2", "gpt-oss-120b@64"])
def test_case(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    result = run_case(case)
    print(result)
    assert_case_holds(result, case.ranks)
    assert (result.read is None) == (name != "llama-3.1-8b@64")
    assert name not in PUBLISHED or abs(result.parameters / PUBLISHED[name] - 1) < 1e-3
