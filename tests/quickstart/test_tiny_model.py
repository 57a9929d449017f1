"""The tiny base: learns, is an ordinary Hugging Face directory, is made once and whole."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dist_peft.core.errors import UserError
from dist_peft.quickstart import tiny_model as tiny
from dist_peft.quickstart.corpus import SourceFile, read_stdlib_files
from dist_peft.quickstart.tiny_model import TinyBaseReport, pretrain_tiny_base

Losses = list[float]

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def little_text() -> Iterator[None]:
    """A few files, so that the tokenizer is there at once."""
    everything = read_stdlib_files()
    files = [f for f in everything if not f.held_out][:5]
    files += [f for f in everything if f.held_out][:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "read_stdlib_files", lambda: files)
        patch.setattr(tiny, "_MIN_GAIN", 0.01)  # six steps
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyBaseReport, Losses]:
    directory = tmp_path_factory.mktemp("tiny") / "new" / "base"
    losses: Losses = []

    def note(step: int, loss: float) -> None:
        assert step == len(losses) + 1
        losses.append(loss)

    return directory, pretrain_tiny_base(directory, steps=STEPS, on_step=note), losses


def test_learns(made: tuple[Path, TinyBaseReport, Losses]) -> None:
    _, report, losses = made
    assert report.steps == len(losses) == STEPS
    assert report.tokens == report.steps * 8 * 256
    assert losses[-1] < losses[0]
    assert report.beats_uniform
    assert not report.reused
    assert 1e6 < report.parameters < 2e6
    assert "1.05 M parameters" in str(report)


def test_is_a_hugging_face_directory(made: tuple[Path, TinyBaseReport, Losses]) -> None:
    directory, report, _ = made
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == report.parameters
    assert all(m.in_features % 64 == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))
    text = "def f(x):\n\treturn 'ü' + x  # , .\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "Hi" in chat
    # what is saved is what was measured
    held_out = tiny._cut_into_sequences(
        tokenizer.backend_tokenizer, [f for f in tiny.read_stdlib_files() if f.held_out]
    )
    assert tiny._evaluate_loss(model, held_out) == pytest.approx(report.held_out_loss, rel=1e-4)


def test_is_reused(made: tuple[Path, TinyBaseReport, Losses]) -> None:
    directory, report, _ = made
    again = pretrain_tiny_base(directory, steps=STEPS)
    assert again == TinyBaseReport(**{**vars(report), "reused": True})
    assert "made earlier" in str(again)
    with pytest.raises(UserError, match=rf"made with .*{STEPS}.*; choose another directory"):
        pretrain_tiny_base(directory, steps=7)
    with pytest.raises(UserError, match="choose another directory"):
        pretrain_tiny_base(directory, steps=STEPS, seed=1)


def test_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    pretrain_tiny_base(tmp_path, steps=2)  # an empty directory is free
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_nothing_half_made_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, directory: Path) -> None:
        assert Path(directory, "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(UserError, match="disk full while writing"):
        pretrain_tiny_base(tmp_path / "base", steps=2)
    assert not list(tmp_path.iterdir())


def test_same_seed_gives_the_same_rows_and_weights() -> None:
    files: list[SourceFile] = tiny.read_stdlib_files()
    tokenizer = tiny._train_tokenizer([f.text for f in files])
    assert tokenizer.to_str() == tiny._train_tokenizer([f.text for f in files]).to_str()
    rows = tiny._cut_into_sequences(tokenizer, files)
    weights, losses = [], []
    for _ in range(2):
        with tiny._fork_random_state(7):
            model = tiny._build_untrained_model(tokenizer)
            weights.append(model.lm_head.weight.detach().clone())
            losses.append(tiny._pretrain_model(model, rows, 2, None))
    assert torch.equal(weights[0], weights[1])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_windows_are_the_text(made: tuple[Path, TinyBaseReport, Losses]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    text = "x = 1\n" * 300
    rows = tiny._cut_into_sequences(
        tokenizer.backend_tokenizer, [SourceFile("a.py", text, False)] * 2
    )
    document = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    joined = [*document, *document]
    assert rows.shape[1] == 257
    assert rows.flatten().tolist() == joined[: rows.numel()]
    assert len(joined) - rows.numel() < 257


def test_base_no_better_than_guessing_is_not_kept(
    made: tuple[Path, TinyBaseReport, Losses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "_MIN_GAIN", 3.0)
        with pytest.raises(UserError, match=r"after 1 steps .* uniform 7\.62\) and is not kept"):
            pretrain_tiny_base(tmp_path / "base", steps=1)
    assert not list(tmp_path.iterdir())
    # one that an earlier version kept is made again, by another request too
    directory = tmp_path / "kept"
    shutil.copytree(made[0], directory)
    file = directory / "tiny_base.json"
    record = json.loads(file.read_text())
    record["request"] = {"seconds": 75.0, "seed": 0}
    record["report"]["held_out_loss"] = 8.0
    file.write_text(json.dumps(record))
    report = pretrain_tiny_base(directory, steps=2)
    assert report.steps == 2 and not report.reused and report.beats_uniform
    assert pretrain_tiny_base(directory, steps=2).reused


def test_schedule() -> None:
    assert tiny._lr_factor(0, 1000) == pytest.approx(1 / 20)
    assert tiny._lr_factor(500, 1000) == pytest.approx(0.03 + 0.97 / 2)
    assert tiny._lr_factor(999, 1000) == pytest.approx(0.03, abs=1e-4)
    assert [tiny._lr_factor(0, steps) for steps in (1, 2, 20)] == [1, 0.5, 0.05]


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no tiny base"):
        pretrain_tiny_base(tmp_path, steps=1)
    with pytest.raises(UserError, match="needs some steps"):
        pretrain_tiny_base(tmp_path / "x", steps=0)
