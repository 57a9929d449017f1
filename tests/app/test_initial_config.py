"""The proposed configuration: its choices follow the files, odd names survive, and it would run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_peft.app.initial_config import InitRequest, propose_config, state_steps, validate_text
from dist_peft.core.errors import UserError
from dist_peft.plan.cluster import Cluster
from tests.support.data_files import byte_tokenizer, write_jsonl
from tests.support.tiny_models import CONFIGS

Tree = dict[str, Any]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DIST_PEFT_CACHE", str(tmp_path / "cache"))
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = CONFIGS["llama"]
    config.update({"vocab_size": 300, "max_position_embeddings": 512})
    config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def propose(base: str, data: Path, **settings: Any) -> Tree:
    request = InitRequest(base, str(data), Path("run.yaml"), "runs/run", start="go", **settings)
    tree: Tree = yaml.safe_load(propose_config(request))
    return tree


def make_pairs(count: int, size: int = 20) -> list[Tree]:
    return [{"question": f"q{i}", "answer": "a" * size} for i in range(count)]


def test_defaults_of_lora_without_regret(tmp_path: Path, base: str) -> None:
    tree = propose(base, write_jsonl(tmp_path / "a.jsonl", make_pairs(400)))
    assert tree["adapter"] == {"kind": "lora", "r": 32, "alpha": 32, "target_modules": "all-linear"}
    assert tree["train"]["lr"] == 2e-4 and tree["base"]["quant"] is None
    assert tree["data"]["train"][0]["columns"] == {"prompt": "question", "completion": "answer"}
    assert tree["data"]["val_split"] == 0.05 and tree["data"]["seq_len"] == 64
    assert "too_long" not in tree["data"] and tree["train"]["global_batch"] == 16


def test_the_counted_steps_are_stated() -> None:
    text = "  # one epoch, about 1,234 steps; or epochs: 3, or steps: 500\n  lr: 1\n"
    counted = "  # one epoch, 1,300 steps; or epochs: 3, or steps: 500\n  lr: 1\n"
    assert state_steps(text, 1300) == counted
    assert state_steps("  # one epoch; or epochs: 3", 7) == "  # one epoch; or epochs: 3"


def test_few_records_make_small_steps_and_no_split(tmp_path: Path, base: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", make_pairs(10))
    tree = propose(base, data)
    assert "val_split" not in tree["data"] and "eval_every" not in tree["train"]
    assert tree["train"]["global_batch"] == 1
    held_out = propose(base, data, held_out="x.jsonl")
    assert held_out["data"]["eval"] == ["x.jsonl"] and held_out["train"]["eval_every"] == 1
    with pytest.raises(UserError, match="fewer than the 64 cards"):
        propose(base, data, ranks=64)
    assert propose(base, data, ranks=3)["train"]["global_batch"] == 3


def test_long_documents_are_cut_at_the_positions(tmp_path: Path, base: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", make_pairs(30, 700))
    tree = propose(base, data)
    assert tree["data"]["seq_len"] == 512 and tree["data"]["too_long"] == "truncate"
    tree = propose(base, data, seq_len=1024)
    assert tree["data"]["seq_len"] == 1024 and "too_long" not in tree["data"]
    text = tmp_path / "a.txt"
    text.write_text("x" * 5000)
    tree = propose(base, text)
    assert tree["data"]["seq_len"] == 512 and "val_split" not in tree["data"]


def test_classifier_reads_its_labels(tmp_path: Path, base: str) -> None:
    records = [{"text": f"t{i}", "class": [1, 0][i % 2]} for i in range(30)]
    data = write_jsonl(tmp_path / "a.jsonl", records)
    tree = propose(base, data, classify=True, columns={"label": "class"})
    assert tree["base"]["head"] == "classifier" and "packing" not in tree["data"]
    assert tree["data"]["train"][0]["labels"] == ["0", "1"]
    for columns, words in (({}, "has no label in column label"), ({"label": "text"}, None)):
        if words:
            with pytest.raises(UserError, match=words):
                propose(base, data, classify=True, columns=columns)
    many = write_jsonl(tmp_path / "b.jsonl", [{"text": "t", "label": i} for i in range(60)])
    with pytest.raises(UserError, match="more than 50 values"):
        propose(base, many, classify=True)
    one = write_jsonl(tmp_path / "c.jsonl", [{"text": "t", "label": "x"}] * 3)
    with pytest.raises(UserError, match="a classifier needs two"):
        propose(base, one, classify=True)


def test_odd_names_survive_and_the_proposal_would_run(tmp_path: Path, base: str) -> None:
    name = tmp_path / 'a: {b} ${c} "d" é.jsonl'
    records = [{"my: question #1": f"q{i}", "yes": "a b c"} for i in range(30)]
    write_jsonl(name, records)
    columns = {"prompt": "my: question #1", "completion": "yes"}
    request = InitRequest(base, str(name), Path("r.yaml"), "runs/r", columns=columns)
    text = propose_config(request)
    config, report = validate_text(text, Cluster(1, 1, 1 << 40), has_limit=True)
    assert config.data.train[0].path == str(name) and config.data.train[0].columns == columns
    assert report.memory is not None and report.memory.fits
    broken = text.replace("seq_len: 64", "seq_len: 8")
    with pytest.raises(UserError, match=r"nothing is written: .* more than data.seq_len 8"):
        validate_text(broken, Cluster(1, 1, 1 << 40), has_limit=True)


def test_records_that_a_run_would_refuse(tmp_path: Path, base: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "label": False}])
    with pytest.raises(UserError, match="column label is False"):
        propose(base, data)
    with pytest.raises(UserError, match="does not exist"):
        propose(base, tmp_path / "nowhere.jsonl")
