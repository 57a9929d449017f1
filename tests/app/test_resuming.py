"""What a resumed run may have changed, and what is refused by key with both values."""

import datetime
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_peft.app import resuming
from dist_peft.app.resuming import check_run_is_resumable, may_change_on_resume
from dist_peft.core.agreement import flatten_tree
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.checkpoint import RunPosition
from tests.support.dist import run_ranks
from tests.support.rank_inputs import changed, other_inputs
from tests.support.story_runs import losses, train
from tests.support.tiny_runs import save_words, tiny_tree

pytestmark = pytest.mark.e2e

Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture
def stopped(tmp_path: Path) -> Tree:
    """A run that stopped after its first step."""
    tree = tiny_tree(tmp_path, data__eval=[])
    assert train(World(), tree, 1) == 75
    return tree


REFUSED: dict[str, tuple[str, object, str]] = {
    "r": ("adapter.r", 5, "adapter.r is 5, there 4"),
    "alpha": ("adapter.alpha", 9, "adapter.alpha is 9.0, there 8.0"),
    "quant": ("base.quant", {"kind": "nf4"}, 'base.quant.kind is "nf4", there not set'),
    "packed ends": ("base.quant", {"embeddings": True}, "base.quant.embeddings is true, there"),
    "dtype": ("base.compute_dtype", "bfloat16", "base.compute_dtype is"),
    "seed": ("train.seed", 1, "train.seed is 1, there 0"),
    "shuffle": ("train.shuffle", False, "train.shuffle is false, there true"),
    "loss_on": ("data.loss_on", "all", 'data.loss_on is "all", there "completion"'),
    "seq_len": ("data.seq_len", 32, "data.seq_len is 32, there 16"),
    "global_batch": ("train.global_batch", 4, "train.global_batch is 4, there 2"),
    "betas": ("train.betas", [0.5, 0.9], "train.betas is [0.5, 0.9], there [0.9, 0.999]"),
    "eps": ("train.eps", 1e-3, "train.eps is 0.001, there 1e-08"),
    "precision": ("train.precision", "fp32", 'train.precision is "fp32", there "bf16"'),
}


def test_refused_by_key_with_both_values(stopped: Tree, tmp_path: Path) -> None:
    others = {name: (changed(stopped, k, v), text) for name, (k, v, text) in REFUSED.items()}
    inputs = other_inputs(stopped, tmp_path / "other")
    others |= {name: (tree, text.partition(" is")[0]) for name, (tree, text) in inputs.items()}
    other_base = "was trained on another base than"  # says how it differs, which no value does
    through = changed(stopped, "base.quant", {"kind": "int", "group_size": 8})
    through = changed(through, "adapter.through_quantizer", True)
    zeros = changed(through, "adapter.through_zeros", True)
    others["zeros"] = (zeros, "adapter.through_zeros is true, there false")
    others["through"] = (through, "adapter.through_quantizer is true, there false")
    others["weights"] = (others["weights"][0], f"step-000001 {other_base}")
    before = sorted(p.name for p in (tmp_path / "run").rglob("*") if p.name != "log.txt")
    with mock.patch(
        "dist_peft.app.python_api.load_weights", side_effect=AssertionError("base was loaded")
    ):
        for name, (tree, text) in others.items():
            with pytest.raises(UserError, match=re.escape(text)) as caught:
                train(World(), tree)
            told = other_base if name == "weights" else "step-000001 is of another run"
            assert told in str(caught.value), name
            assert "resume: never" in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "run").rglob("*") if p.name != "log.txt") == before
    (data,) = (other for other, text in others.values() if text == "contents of data.train")
    with pytest.raises(UserError, match=r"contents of data.train is \"8 rows, fingerprint \w{32}"):
        train(World(), data)


def test_records_changed_in_place_are_refused(stopped: Tree) -> None:
    """Same path, same number of records, same length."""
    file = Path(stopped["data"]["train"][0])
    file.write_text(file.read_text().replace("w4 w5 ", "w5 w4 "))
    with pytest.raises(UserError, match=r"contents of data\.train is"):
        train(World(), stopped)


def test_augmented_run_resumes_exactly_and_not_with_other_variants(tmp_path: Path) -> None:
    """Steps of two epochs, with noise; the synonyms are changed in place, or the number."""
    synonyms = tmp_path / "synonyms.txt"
    synonyms.write_text("w4: w50, w51\nw11: w52\n")
    augment = {"kind": "eda", "num_aug": 2, "synonyms": str(synonyms), "fields": ["completion"]}
    source = {"path": str(tmp_path / "train.jsonl"), "augment": augment}
    tree = tiny_tree(tmp_path, data__eval=[], train__neftune_alpha=5)
    tree = changed(tree, "data.train", [source])
    tree = changed(tree, "train.steps", 6)
    whole = changed(tree, "save.dir", str(tmp_path / "whole"))
    assert train(World(), whole) == 0
    assert train(World(), tree, 3) == 75
    moved = tmp_path / "moved.txt"
    synonyms.rename(moved)
    augment["synonyms"] = str(moved)
    other = changed(tree, "data.train", [{**source, "augment": {**augment, "num_aug": 3}}])
    other = changed(other, "train.neftune_alpha", 1)
    with pytest.raises(UserError, match=r"augment\.num_aug is 3, there 2") as caught:
        train(World(), other)
    assert "train.neftune_alpha is 1.0, there 5.0" in str(caught.value)
    text = moved.read_text()
    moved.write_text(text.replace("w50, w51", "w60, w61"))
    with pytest.raises(UserError, match=r"contents of data\.train is"):
        train(World(), tree)
    moved.write_text(text)
    assert train(World(), tree) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_tokenizer_changed_in_place_is_refused(stopped: Tree) -> None:
    file = Path(stopped["base"]["path"]) / "tokenizer.json"
    tree = json.loads(file.read_text())
    table = tree["model"]["vocab"]
    table["w95"], table["w96"] = table["w96"], table["w95"]
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer of base\.path is"):
        train(World(), stopped)


def test_moved_run_with_other_steps_goes_on_and_says_what_changed(
    stopped: Tree, tmp_path: Path
) -> None:
    """Everything lies elsewhere now: base, data, cache and the run."""
    moved = tmp_path / "moved"
    for name in ("base", "run"):
        shutil.move(tmp_path / name, moved / name)
    shutil.move(tmp_path / "train.jsonl", moved / "records.jsonl")
    tree = changed(stopped, "base.path", str(moved / "base"))
    tree = changed(tree, "data.train", [str(moved / "records.jsonl")])
    tree = changed(tree, "data.cache_dir", str(moved / "cache"))
    tree = changed(tree, "save.dir", str(moved / "run"))
    for key, value in (("lr", 0.5), ("steps", 2), ("micro_batch", 2), ("schedule", "linear")):
        tree = changed(tree, f"train.{key}", value)
    assert train(World(), tree) == 0
    log = (moved / "run" / "log.txt").read_text()
    assert "resuming with train.lr 0.5, before 0.01" in log
    assert 'resuming with train.schedule "linear", before "cosine"' in log
    assert "resuming with train.steps 2, before 3" in log
    assert "resuming with save.dir" in log and "resumed" in log


@pytest.mark.dist
def test_resumed_on_more_ranks_says_so(stopped: Tree, tmp_path: Path) -> None:
    assert run_ranks(train, 2, stopped) == [0, 0]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "resuming with number of ranks 2, before 1" in log
    assert 'resuming with engine in use "fsdp2", before "single"' in log


def test_split_and_template_are_part_of_the_run(tmp_path: Path) -> None:
    """The template's text goes into the run, and its file may go; a resume has the same split."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}w7 {{ m['content'] }} "
        "{% endif %}{% endfor %}"
    )
    records = [
        {
            "messages": [
                {"role": "user", "content": f"w{i + 50}"},
                {"role": "assistant", "content": f"w{i + 70} w5 "},
            ]
        }
        for i in range(10)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    tree = tiny_tree(tmp_path, data__eval=[])
    for key, value in (
        ("data.train", [str(tmp_path / "chat.jsonl")]),
        ("data.val_split", 0.2),
        ("data.chat_template", str(template)),
    ):
        tree = changed(tree, key, value)
    assert train(World(), tree, 1) == 75
    with pytest.raises(UserError, match=r"data\.val_split is 0\.4, there 0\.2"):
        train(World(), changed(tree, "data.val_split", 0.4))
    text = template.read_text()
    template.write_text(text.replace("w7", "w8"))
    with pytest.raises(UserError, match=r"data\.chat_template is"):
        train(World(), tree)
    assert train(World(), changed(tree, "data.chat_template", text)) == 0
    run = tmp_path / "run"
    assert (run / "adapter" / "chat_template.jinja").read_text() == text
    assert load_config(run / "config.yaml").data.chat_template == text
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["eval_loss"] > 0
    log = (run / "log.txt").read_text()
    assert "2 of 10 records of data.train[0] are held out" in log


def test_every_key_is_refused_unless_it_was_thought_of() -> None:
    """The patterns name keys that exist; all others, coming ones too, are refused."""
    sources = [{"path": "x", "format": "completion", "columns": {"prompt": "p"}}]
    tree = {"base": {"path": "b"}, "data": {"train": sources, "eval": sources}}
    keys = set(flatten_tree(parse_config(tree).model_dump(mode="json")))
    refused = {
        key
        for key in keys
        if not may_change_on_resume(key) and not key.startswith(("resume", "sweep"))
    }
    assert refused == {
        "base.compute_dtype",
        "base.head",
        *(k for k in keys if k.startswith(("base.quant.", "adapter."))),
        *(f"data.{k}" for k in ("loss_on", "mixing", "packing", "seq_len", "temperature")),
        *(f"data.{k}" for k in ("val_split", "chat_template")),
        "data.train[0].domain",
        *(f"data.train[0].{k}" for k in ("from_step", "to_step", "weight", "positive_label")),
        "data.train[0].augment",
        *(f"train.{k}" for k in ("betas", "eps", "global_batch", "optimizer", "precision")),
        *(f"train.{k}" for k in ("seed", "shuffle", "tasks", "layer_decay", "metric_for_best")),
        "train.exact",
        "train.neftune_alpha",
        "train.scheduled_sampling",
        "train.domain_adversarial",
    }
    assert not may_change_on_resume("train.unknown") and not may_change_on_resume(
        "adapter.adapters[0].name"
    )
    assert may_change_on_resume("adapter.adapters[12].path") and may_change_on_resume(
        "data.train[3].path"
    )


@pytest.mark.parametrize(
    ("before", "now", "good"),
    [("adamw", "paged_adamw8bit", True), ("adamw8bit", "adamw", True), ("adamw", "other", False)],
)
def test_optimizer_of_the_same_algorithm(before: str, now: str, good: bool) -> None:
    found = RunPosition(1, 2, 0, "", {"train.optimizer": before})
    if good:
        check_run_is_resumable(Path("c"), found, {"train.optimizer": now})
    else:
        with pytest.raises(UserError, match=r"train\.optimizer"):
            check_run_is_resumable(Path("c"), found, {"train.optimizer": now})


@pytest.mark.parametrize(
    ("samples", "seed", "message"),
    [(8, 3, None), (7, 3, "samples is 7, and by its values 8"), (8, 4, "seed is 4, and by its")],
)
def test_position_that_contradicts_its_values(samples: int, seed: int, message: str | None) -> None:
    """It selects the next rows and random numbers."""
    values = {"train.global_batch": 4, "train.seed": 3}
    found = RunPosition(2, samples, seed, "", values)
    if message is None:
        check_run_is_resumable(Path("c"), found, values)
        return
    with pytest.raises(UserError, match=f"damaged run.json: {message}"):
        check_run_is_resumable(Path("c"), found, values)


def test_checkpoint_of_the_first_format_is_refused() -> None:
    with pytest.raises(UserError, match="written by an earlier version"):
        check_run_is_resumable(Path("c"), RunPosition(1, 2, 0, "", {}, 1), {"train.lr": 1})


def test_date_in_the_template_is_that_of_the_first_start(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, data__eval=[], data__seq_len=64)
    base = Path(tree["base"]["path"])
    save_words(base)
    (base / "chat_template.jinja").write_text(
        "w5{{ strftime_now(' w%d') }} {% for m in messages %}{{ m.content }} "
        "{% generation %}w2{% endgeneration %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w9"}]
    records = tmp_path / "train.jsonl"
    records.write_text(f"{json.dumps({'messages': turns})}\n" * 4)

    class FirstDay(datetime.date):
        @classmethod
        def today(cls) -> "FirstDay":
            return cls(2024, 2, 11)

    with mock.patch.object(resuming.datetime, "date", FirstDay):
        assert train(World(), tree, 1) == 75
    run_json = tmp_path / "run" / "checkpoints" / "step-000001" / "run.json"
    assert json.loads(run_json.read_text())["values"]["date in the chat template"] == "2024-02-11"
    assert train(World(), tree) == 0  # today
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("in this run, also when it is resumed, it is 2024-02-11") == 2
