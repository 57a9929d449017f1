"""``dist-peft quantize``: its options; the packed base is tested in ``tests/app``."""

import pytest

from dist_peft.app import cli
from dist_peft.app.commands import quantize


def test_arguments_and_overrides() -> None:
    argv = ["quantize", "--config", "c.yaml", "--out", "packed", "base.quant.bits=3"]
    args = cli.build_verb_parser(argv).parse_args(argv)
    assert args.run is quantize.run
    assert (str(args.config), str(args.out)) == ("c.yaml", "packed")
    assert args.overrides == ["base.quant.bits=3"]


def test_out_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quantize", "--config", "c.yaml"]
    with pytest.raises(SystemExit) as caught:
        cli.build_verb_parser(argv).parse_args(argv)
    assert caught.value.code == 2 and "--out" in capsys.readouterr().err
