import json

import pytest

from dist_peft.app.cli import main
from tests.support.live_storage import odd_tree, save_odd_base
from tests.support.tiny_runs import save_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("plan")
    return str(save_config(directory, odd_tree(save_odd_base(directory / "base"))))


@pytest.mark.e2e
def test_a_plan_that_fits_and_one_that_does_not(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--config", config, "--gpus-per-node", "3"]
    assert main([*command, "--gpu-memory", "24GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["engine"] == "fsdp2" and plan["memory"]["fits"] and plan["time"] is None
    assert plan["memory"]["total"] == sum(item["bytes"] for item in plan["memory"]["items"])
    assert len(plan["own_rows"]) == 3
    assert main([*command, "--gpu-memory", "256MiB", "adapter.r=3"]) == 3
    assert "MISSING" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "lots"], "'lots' is no amount of memory"),
        (["--gpu-memory", "1GiB", "--nodes", "0"], "--nodes 0: give a number of 1 or more"),
        (["--gpu-memory", "1GiB", "--gpu", "H1000"], "--gpu H1000 is not known; known are B200"),
        (["--gpu-memory", "1GiB", "--link", "fast"], "'fast' is no rate of a link"),
    ],
)
def test_wrong_options(
    config: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", config, *options]) == 2
    assert message in capsys.readouterr().err
