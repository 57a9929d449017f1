"""``dist-peft prune``: its options; the pruned base is tested in ``tests/app``."""

import pytest

from dist_peft.app import cli
from dist_peft.app.commands import prune

GIVEN = {"--config": "c.yaml", "--out": "pruned", "--method": "wanda", "--sparsity": "2:4"}


def list_arguments(**changes: str) -> list[str]:
    given = {**GIVEN, **{f"--{key.replace('_', '-')}": value for key, value in changes.items()}}
    return ["prune", *(part for pair in given.items() for part in pair)]


def test_arguments_and_overrides() -> None:
    argv = [*list_arguments(calibration_samples="7"), "train.seed=3"]
    args = cli.build_verb_parser(argv).parse_args(argv)
    assert args.run is prune.run and args.overrides == ["train.seed=3"]
    assert (str(args.config), str(args.out), args.method) == ("c.yaml", "pruned", "wanda")
    assert str(args.sparsity) == "2:4"
    assert (args.calibration_samples, args.calibration_tokens) == (7, 2048)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "obd", "invalid choice: 'obd'"),
        ("sparsity", "1.5", "1.5 is neither a share of the weights between 0 and 1"),
        ("sparsity", "4:2", "4:2 is no pattern N:M"),
        ("calibration_samples", "0", "0 is no whole number from 1 on"),
        ("calibration_tokens", "7", "7 is no whole number from 8 on"),
    ],
)
def test_refused(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = list_arguments(**{option: value})
    with pytest.raises(SystemExit) as caught:
        cli.build_verb_parser(argv).parse_args(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err
