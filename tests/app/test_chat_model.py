"""Runs and finished models generate what plain transformers generates, on any number of ranks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_peft.app import cli
from dist_peft.app.chat_model import (
    ChatModel,
    choose_template,
    open_model_directory,
    open_run,
)
from dist_peft.app.checkpoint_adapter import ChatFiles, read_chat_files
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.model.generation import Sampling
from tests.support.forked_commands import run_forked
from tests.support.tiny_runs import save_base, save_config, tiny_tree, train

PROMPTS = ("w40 w50", "w77")
TOKENS = 12
OPTIONS: dict[str, Any] = {"device": "cpu", "plain": False, "trust_remote_code": False}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, an NF4 run, and ``merged``, the same in its dequantized base."""
    path = tmp_path_factory.mktemp("chat")
    tree = tiny_tree(path, base__quant={"kind": "nf4"}, train__lr=3e-3)
    assert train(tree) == 0
    merge = ["merge", "--run", str(path / "run"), "--out", str(path / "merged")]
    assert cli.main([*merge, "--base", "decoded", "--dtype", "float32"]) == 0
    return path


def generate_plainly(directory: Path) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = []
    for prompt in ([40, 50], [77]):
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def answer(model: ChatModel, adapter: bool = True, **options: Any) -> list[list[int]]:
    sampling = Sampling(TOKENS, **options)
    prompts = [model.encode_messages([{"role": "user", "content": text}]) for text in PROMPTS]
    return [model.generate_answer(prompt, sampling, adapter=adapter) for prompt in prompts]


@pytest.mark.e2e
def test_greedy_is_that_of_the_merged_model(place: Path) -> None:
    expected = generate_plainly(place / "merged")
    model = open_run(place / "run", "last", World(), **OPTIONS)
    assert answer(model) == expected == answer(model, use_cache=False)
    base = answer(model, adapter=False)
    assert base != expected and answer(model) == expected  # it is on again
    finished = open_model_directory(place / "merged", World(), **OPTIONS)
    assert answer(finished) == expected
    with pytest.raises(UserError, match="a merged model has none"):
        answer(finished, adapter=False)
    assert {len(set(tokens)) > 3 for tokens in [*expected, *base]} == {True}


@pytest.mark.dist
def test_ranks_together_generate_the_same(place: Path) -> None:
    """Both adapter states of the run in one process, then on two ranks, sharded; so the merge."""
    prompts = [item for prompt in PROMPTS for item in ("--prompt", prompt)]
    ask = [*prompts, "--json", "--max-new-tokens", str(TOKENS), "--device", "cpu"]
    alone = open_run(place / "run", "last", World(), **OPTIONS)
    want = [answer(alone), answer(alone, adapter=False)]
    for source, sides in ((["--run", "run", "--adapter", "both"], 2), (["--model", "merged"], 1)):
        first, second = run_forked(["chat", *source, *ask], place, ranks=2)
        assert first.code == second.code == 0, first.stderr + second.stderr
        assert second.stdout == ""
        lines = [json.loads(line) for line in first.stdout.splitlines()]
        assert [line["adapter"] for line in lines] == ["on", "off"][:sides] * 2
        for side in range(sides):
            assert [line["token_ids"] for line in lines[side::sides]] == want[side]


def test_template_of_the_tokenizer_or_none(tmp_path: Path) -> None:
    save_base(tmp_path)
    turns = [
        {"role": "user", "content": "w40"},
        {"role": "assistant", "content": "w41"},
        {"role": "user", "content": "w42"},
    ]
    model = open_model_directory(tmp_path, World(), **OPTIONS)
    assert model.template is None and model.stop_ids == (2,)
    assert model.encode_messages(turns) == [42]
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ {'user': 'w5 ', 'assistant': 'w6 '}[m.role] + m.content + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}w6 {% endif %}"
    )
    model = open_model_directory(tmp_path, World(), **OPTIONS)
    assert model.encode_messages(turns) == [5, 40, 6, 41, 5, 42, 6]
    with pytest.raises(UserError, match="refuses the conversation"):
        model.encode_messages([{"role": "system", "content": "w4"}])
    plain = open_model_directory(tmp_path, World(), **{**OPTIONS, "plain": True})
    assert plain.encode_messages(turns) == [42]


@pytest.mark.e2e
def test_template_of_the_data_is_that_of_the_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``data.chat_template`` in training, in the rows of ``validate``, and in ``chat``."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}w6 {% generation %}"
        "{{ m.content + ' ' + eos_token }}{% endgeneration %}{% else %}w5 {{ m.content }} "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}w6 {% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    turns = [{"role": "user", "content": "w40"}, {"role": "assistant", "content": "w41"}]
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:2]}))
    tree = tiny_tree(tmp_path, train__steps=1)
    tree["data"] |= {
        "train": [str(data)],
        "eval": [],
        "chat_template": str(tmp_path / "own.jinja"),
    }
    file = save_config(tmp_path, tree)
    assert cli.main(["validate", "--config", str(file), "--no-plan", "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "data.chat_template, which marks" in printed and "w5 w40 w6[[w41 w2]]" in printed
    assert train(tree) == 0
    (tmp_path / "own.jinja").unlink()  # the run has its text
    for checkpoint in ("last", "1"):
        model = open_run(tmp_path / "run", checkpoint, World(), **{**OPTIONS, "plain": None})
        assert model.encode_messages(turns[:1]) == [5, 40, 6]
        assert model.stop_ids == (2,)


@pytest.mark.e2e
def test_run_without_conversations_continues_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template of the tokenizer only where it was asked for, or the run is of before."""
    run, template = place / "run", place / "base" / "chat_template.jinja"
    checkpoint = max((run / "checkpoints").glob("step-*"))
    assert read_chat_files(checkpoint).conversations is False
    turn = [{"role": "user", "content": "w40"}]
    command = ["chat", "--run", str(run), "--prompt", "w40", "--max-new-tokens", "1"]
    template.write_text("{% for m in messages %}{{ 'w5 ' + m.content + ' ' }}{% endfor %}w6 ")
    try:
        opened = open_run(run, "last", World(), **{**OPTIONS, "plain": None})
        assert opened.template is None and opened.encode_messages(turn) == [40]
        asked = open_run(run, "last", World(), **{**OPTIONS, "plain": False})
        assert asked.encode_messages(turn) == [5, 40, 6]
        assert cli.main([*command, "--system", "w7"]) == 2
        err = capsys.readouterr().err
        assert "the run was trained on no conversations: prompts are continued as they" in err
        assert "continued as they are; pass --template" in err
        assert cli.main([*command, "--template"]) == 0
        assert "prompts go through the chat template" in capsys.readouterr().err
        unknown, _ = choose_template(asked.tokenizer, ChatFiles(), None)
        assert unknown is not None
    finally:
        template.unlink()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.rmdir(), "does not exist"),
        (lambda path: None, r"has no config\.json"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "an adapter without its"),
        (lambda path: (path / "config.json").write_text("{"), r"config\.json is damaged"),
    ],
)
def test_no_model(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        open_model_directory(tmp_path / "model", World(), **OPTIONS)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run directory: it has no config\.yaml"):
        open_run(tmp_path, "last", World(), **OPTIONS)
