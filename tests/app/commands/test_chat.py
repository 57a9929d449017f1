"""``dist-peft chat``: options, prompts of the command line and of a pipe, mistakes."""

import io
import json
from collections.abc import Iterator

import pytest

from dist_peft.app import cli
from dist_peft.core.log import close_log
from tests.support.tiny_runs import save_base


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("model")))


def test_prompts_of_the_command_line_and_of_a_pipe(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["chat", "--model", model, "--max-new-tokens", "5", "--device", "cpu"]
    assert cli.main([*command, "--prompt", "w40 w41", "--prompt", "w50", "--json"]) == 0
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [a["prompt"] for a in answers] == ["w40 w41", "w50"]
    assert all(len(a["token_ids"]) == 5 for a in answers)
    assert "prompts are continued as they are" in captured.err
    monkeypatch.setattr("sys.stdin", io.StringIO("w40 w41\nw50\n"))
    assert cli.main(command) == 0
    text = [a["text"] for a in answers]
    assert capsys.readouterr().out.splitlines() == text
    drawn = [*command, "--prompt", "w40", "--temperature", "2", "--top-p", "0.9", "--seed"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main([*drawn, seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "off", "--prompt", "w4"], "a merged model has none"),
        (["--checkpoint", "3"], "--checkpoint is of a --run"),
        (["--system", "w4"], "--system needs a chat template"),
        (["--max-new-tokens", "0"], "0 is no number of tokens from 1"),
        (["--temperature", "-1"], "is no temperature"),
        (["--temperature", "nan"], "is no temperature"),
        (["--top-p", "0"], "is no share"),
        (["--top-p", "x"], "is no number"),
        (["--run", "run"], "not allowed with argument"),
    ],
)
def test_mistakes(
    model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["chat", "--model", model, *options])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2 and message in capsys.readouterr().err
