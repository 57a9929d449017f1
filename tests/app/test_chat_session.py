"""Prompts one after another: a conversation, separate ones, both sides, JSON."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from dist_peft.app.chat_model import ChatModel, open_model_directory
from dist_peft.app.chat_session import HELP_LINE, ChatSession, read_stdin_lines
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.generation import Sampling
from tests.support.tiny_runs import save_base

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w5 ', 'assistant': 'w6 ', 'system': 'w7 '}[m.role] }}"
    "{{ m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}w6 {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    path = tmp_path_factory.mktemp("model")
    save_base(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    options = {"device": "cpu", "plain": False, "trust_remote_code": False}
    return open_model_directory(path, World(), **options)


def make_session(model: ChatModel, **options: Any) -> tuple[ChatSession, io.StringIO]:
    output = io.StringIO()
    return ChatSession(model, Sampling(6), output=output, **options), output


def read_answers(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_conversation_keeps_its_turns_until_it_is_reset(model: ChatModel) -> None:
    session, output = make_session(model, as_json=True)
    session.converse(["w40", "w41", "/reset", "w40", "/quit", "w42"])
    first, second, again = read_answers(output)
    assert first["prompt_tokens"] == 3 and again["token_ids"] == first["token_ids"]
    answered = len(model.tokenizer(first["text"], add_special_tokens=False)["input_ids"])
    assert second["prompt_tokens"] == 3 + answered + 3
    assert first["text"] == model.decode_answer(first["token_ids"]) != ""


def test_separate_prompts_know_nothing_of_each_other(model: ChatModel) -> None:
    session, output = make_session(model, as_json=True, system="w50 w51")
    session.answer_separately(["w40", "w41", "w40"])
    answers = read_answers(output)
    assert [a["prompt_tokens"] for a in answers] == [6, 6, 6]
    assert answers[0]["token_ids"] == answers[2]["token_ids"]


def test_both_sides_are_titled_and_separate(model: ChatModel) -> None:
    """The side without the adapter is the same model here: what differs is the bookkeeping."""
    entered = []

    @contextmanager
    def disable() -> Iterator[None]:
        entered.append(1)
        yield

    session, output = make_session(replace(model, disable=disable), adapter="both")
    session.converse(["w40", "/on", "w40", "/off", "w40"])
    lines = output.getvalue().splitlines()
    assert lines[0] == "[with the adapter]" and lines[2] == "[base alone]"
    text = lines[1]
    assert lines == ["[with the adapter]", text, "[base alone]", text, text, text]
    assert len(entered) == 2


def test_a_prompt_that_cannot_be_answered(model: ChatModel) -> None:
    session, output = make_session(model)
    long = "w40 " * (model.model.config.max_position_embeddings + 1)
    session.converse([long, "/unknown"])
    report, help_line = output.getvalue().splitlines()
    assert "max_position_embeddings" in report and help_line == HELP_LINE
    with pytest.raises(UserError, match="max_position_embeddings"):
        session.answer_separately([long])
    with pytest.raises(UserError, match="--system needs a chat template"):
        make_session(replace(model, template=None), system="w4")


def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w40\n\n  \nw41 w42"))
    assert list(read_stdin_lines("> ")) == ["w40", "w41 w42"]


def test_lines_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("w40\n\nw41\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert list(read_stdin_lines("> ")) == ["w40", "w41"]
    assert capsys.readouterr().out.count("> ") == 4
