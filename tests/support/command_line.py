"""Commands called in this process."""

import pytest

from dist_peft.app import cli
from dist_peft.core.log import close_log


def lines(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a verb prints, or its error for another exit code."""
    assert cli.main(argv) == code
    close_log()
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err
