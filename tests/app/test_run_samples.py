"""Samples of whole runs: in the metrics and the report, the same sharded, after a resume, off."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.chat_model import open_run
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.model.generation import Sampling
from dist_peft.train.step_metrics import StepMetrics, read_metrics
from tests.support.dist import run_ranks
from tests.support.story_runs import train as train_until
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e

Samples = list[dict[str, str]]


def make_tree(path: Path, **changes: Any) -> dict[str, Any]:
    defaults = {"train__samples": 2, "train__lr": 3e-3, "data__seq_len": 32}
    return tiny_tree(path, **{**defaults, **changes})


def read_samples(path: Path) -> tuple[Samples, Samples, list[StepMetrics]]:
    records = read_metrics(path / "run" / "metrics.jsonl")
    before, after = records[0].sample_texts_before, records[-1].sample_texts
    assert before is not None and after is not None
    return before, after, records


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples")
    assert train_until(World(), make_tree(path)) == 0
    close_log()
    return path


def test_text_of_the_model_before_and_after(trained: Path) -> None:
    """The same as ``chat`` generates, with the adapter off and on."""
    before, after, records = read_samples(trained)
    assert all(r.sample_texts is None for r in records[:-1])
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after] and len(before) == 2
    model = open_run(
        trained / "run", "last", World(), device="cpu", plain=True, trust_remote_code=False
    )
    for adapter, samples in ((False, before), (True, after)):
        for sample in samples:
            prompt = model.tokenizer(sample["prompt"])["input_ids"]
            tokens = model.generate_answer(prompt, Sampling(16), adapter=adapter)
            assert model.decode_answer(tokens) == sample["text"]
    page = (trained / "run" / "report.html").read_text()
    for sample in (*before, *after):
        assert sample["text"] in page and sample["expected"] in page
    close_log()


def test_resumed_run_has_both(trained: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    assert train_until(World(), tree, 2) == 75
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1].sample_texts is None
    assert train_until(World(), tree) == 0
    assert read_samples(tmp_path)[:2] == read_samples(trained)[:2]
    close_log()


@pytest.mark.dist
def test_ranks_that_shard_the_model_generate_the_same(trained: Path, tmp_path: Path) -> None:
    assert run_ranks(train_until, 2, make_tree(tmp_path)) == [0, 0]
    assert read_samples(tmp_path)[:2] == read_samples(trained)[:2]


def test_without(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, train__samples=0)
    assert train_until(World(), tree) == 0
    assert all(r.sample_texts_before is None for r in read_metrics(tmp_path / "run/metrics.jsonl"))
    assert "Samples" not in (tmp_path / "run" / "report.html").read_text()
    close_log()
