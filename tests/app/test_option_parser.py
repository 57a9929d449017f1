"""Options of other trainers are refused with the key of the configuration."""

import pytest

from dist_peft.app.cli import build_verb_parser, main
from dist_peft.app.option_parser import find_option_hints


@pytest.mark.parametrize(
    ("message", "hints"),
    [
        (
            "unrecognized arguments: --learning_rate=1e-4 x",
            ["--learning_rate: here it is train.lr; keys are written KEY=VALUE, without dashes"],
        ),
        ("--train.lr 1", ["--train.lr: write train.lr=VALUE, without dashes"]),
        ("--seq-len 3", ["--seq-len: write data.seq_len=VALUE, without dashes"]),
        ("--path x --xyzzy --lr-", []),  # several keys are called path
        (
            "--load-in-4bit --report_to none",
            [
                "--load-in-4bit: here it is base.quant: {kind: nf4} (false: base.quant: null); "
                "keys are written KEY=VALUE, without dashes",
                "--report_to: here it is save.track (a list of wandb, mlflow and trackio; "
                "TensorBoard files are always written); keys are written KEY=VALUE, without dashes",
            ],
        ),
    ],
)
def test_hints(message: str, hints: list[str]) -> None:
    assert find_option_hints(message) == hints


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], "normal"), (["-q"], "quiet"), (["--verbose"], "verbose")],
)
def test_verbosity(options: list[str], expected: str) -> None:
    args = build_verb_parser(["inspect"]).parse_args(["inspect", "x", *options])
    assert args.verbosity == expected


def test_quiet_and_verbose_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "x", "-q", "-v"])
    assert "not allowed with argument -q" in capsys.readouterr().err


def test_the_command_line_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", "run.yaml", "--output_dir", "out"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dist-peft: error: unrecognized arguments: --output_dir")
    assert error.endswith("here it is save.dir; keys are written KEY=VALUE, without dashes")
