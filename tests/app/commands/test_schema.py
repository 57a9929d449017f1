import json

import pytest

from dist_peft.app.cli import main
from dist_peft.core.config.json_schema import build_json_schema


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == build_json_schema()
