"""The tiny base: learns, is an ordinary Hugging Face directory, is made once and whole."""

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

SECONDS = 2
"""Of pretraining: a few steps."""


@pytest.fixture(scope="module", autouse=True)
def little_text() -> Iterator[None]:
    """A few files, so that the tokenizer is there at once."""
    everything = read_stdlib_files()
    files = [f for f in everything if not f.held_out][:12]
    files += [f for f in everything if f.held_out][:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "read_stdlib_files", lambda: files)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyBaseReport, Losses, Losses]:
    directory = tmp_path_factory.mktemp("tiny") / "new" / "base"
    losses: Losses = []
    shares: Losses = []

    def note(step: int, loss: float, share: float) -> None:
        assert step == len(losses) + 1
        losses.append(loss)
        shares.append(share)

    return directory, pretrain_tiny_base(directory, seconds=SECONDS, on_step=note), losses, shares


def test_learns(made: tuple[Path, TinyBaseReport, Losses, Losses]) -> None:
    _, report, losses, shares = made
    assert report.steps == len(losses) > 1
    assert report.tokens == report.steps * 8 * 256
    assert losses[-1] < losses[0]
    assert shares == sorted(shares)
    assert shares[-1] <= 1
    assert not report.reused
    assert 1e6 < report.parameters < 2e6
    assert "1.05 M parameters" in str(report)


def test_is_a_hugging_face_directory(made: tuple[Path, TinyBaseReport, Losses, Losses]) -> None:
    directory, report, _, _ = made
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


def test_is_reused(made: tuple[Path, TinyBaseReport, Losses, Losses]) -> None:
    directory, report, _, _ = made
    again = pretrain_tiny_base(directory, seconds=SECONDS)
    assert again == TinyBaseReport(**{**vars(report), "reused": True})
    assert "made earlier" in str(again)
    with pytest.raises(UserError, match=rf"made with .*{SECONDS}.*; choose another directory"):
        pretrain_tiny_base(directory, seconds=6)
    with pytest.raises(UserError, match="choose another directory"):
        pretrain_tiny_base(directory, seconds=SECONDS, seed=1)


def test_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    pretrain_tiny_base(tmp_path, seconds=0.1)  # an empty directory is free
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_nothing_half_made_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, directory: Path) -> None:
        assert Path(directory, "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(UserError, match="disk full while writing"):
        pretrain_tiny_base(tmp_path / "base", seconds=0.1)
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
            losses.append(tiny._pretrain_model(model, rows, 1e-9, None))
    assert torch.equal(weights[0], weights[1])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1  # at least one step, however short the time


def test_windows_are_the_text(made: tuple[Path, TinyBaseReport, Losses, Losses]) -> None:
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


def test_schedule_follows_the_clock() -> None:
    assert tiny._lr_factor(0, 0.0) == pytest.approx(1 / 20)
    assert tiny._lr_factor(100, 0.0) == 1
    assert tiny._lr_factor(100, 0.5) == pytest.approx(0.03 + 0.97 / 2)
    assert tiny._lr_factor(100, 1.0) == tiny._lr_factor(100, 1.7) == pytest.approx(0.03)


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no tiny base"):
        pretrain_tiny_base(tmp_path, seconds=1)
    with pytest.raises(UserError, match="needs some time"):
        pretrain_tiny_base(tmp_path / "x", seconds=0)
