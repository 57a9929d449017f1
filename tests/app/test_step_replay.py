"""``dist-peft replay``: equal steps, steps of changed files, and runs that are refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from dist_peft.app import cli, step_replay
from dist_peft.app.step_replay import StopAfter, find_difference, replay_run
from dist_peft.core.world import World
from dist_peft.train.state_chain import ChainLink, ChainOrigin, StateChain
from dist_peft.train.step_metrics import StepMetrics
from tests.support.audited_runs import change_weight, copy_run, exact_run, forge_chain, forge_state
from tests.support.dist import run_ranks
from tests.support.tiny_runs import tiny_tree, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_run(tmp_path_factory.mktemp("replay"))


def digest_files(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def call(run_dir: Path, first: int, last: int, *options: str) -> int:
    return cli.main(
        ["replay", "--run", str(run_dir), "--from", str(first), "--to", str(last), *options]
    )


def test_equal_steps(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest_files(run_dir)
    assert call(run_dir, 2, 4, "--scratch", str(tmp_path)) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("steps 3 to 4: equal in losses") and "1 recorded states" in said
    assert said.endswith("adapter included")
    assert digest_files(run_dir) == before and not list(tmp_path.iterdir())


def test_from_the_start(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run_dir, 0, 3) == 0
    assert "steps 1 to 3: equal" in capsys.readouterr().out


def replay_on_ranks(world: World, run_dir: Path) -> int:
    return replay_run(run_dir, 0, 4, world, lambda: False, allow_scope=False, scratch=None)


@pytest.mark.dist
def test_steps_of_one_process_are_equal_on_two_ranks(run_dir: Path) -> None:
    assert run_ranks(replay_on_ranks, 2, run_dir) == [0, 0]


def test_a_forged_state_is_found(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chain of hashes was computed again, so that it fits."""
    copy = copy_run(run_dir, tmp_path)
    forge_state(copy / "checkpoints" / "step-000004")
    assert call(copy, 2, 4) == 4
    assert "parameters or moments are not those" in capsys.readouterr().err
    forge_chain(copy)
    assert call(copy, 2, 4) == 4
    assert "step 4 is the first that differs: parameters or moments" in capsys.readouterr().err


def test_a_changed_adapter_is_found(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_run(run_dir, tmp_path)
    change_weight(copy / "adapter" / "adapter_model.safetensors")
    assert call(copy, 2, 4) == 4
    assert "adapter_model.safetensors was changed" in capsys.readouterr().err


def test_changed_inputs_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "all"
    shutil.copytree(run_dir.parent, root)
    config = root / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(run_dir.parent), str(root)))
    data = root / "train.jsonl"
    rows = data.read_text().splitlines()
    data.write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")
    assert call(root / "run", 2, 3) == 2
    assert "contents of data.train is" in capsys.readouterr().err
    assert call(root / "run", 0, 2) == 2
    assert "data.train has other sequences" in capsys.readouterr().err
    data.write_text("\n".join(rows) + "\n")
    base = root / "base" / "config.json"
    base.write_text(base.read_text() + "\n")
    assert call(root / "run", 2, 3) == 2
    assert "config.json is not the file" in capsys.readouterr().err


def test_refusals(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for first, last, message in (
        (3, 4, "keeps no checkpoint of that step; there are 0, 2, 4"),
        (2, 9, "has no record of step 5; --to is at most 4"),
        (4, 2, "give 0 <= from < to"),
    ):
        assert call(run_dir, first, last) == 2
        assert message in capsys.readouterr().err
    assert train(tiny_tree(tmp_path)) == 0
    assert call(tmp_path / "run", 0, 1) == 2
    assert "trained without train.exact" in capsys.readouterr().err
    others = {"version of torch": "0.1"}
    monkeypatch.setattr(
        step_replay,
        "describe_versions",
        lambda known=step_replay.describe_versions: known() | others,
    )
    assert call(run_dir, 2, 3) == 2
    assert "version of torch is 0.1, and was" in capsys.readouterr().err
    assert call(run_dir, 2, 3, "--other-scope") == 0


def test_the_first_difference_is_named() -> None:
    def metrics(loss: float) -> dict[int, StepMetrics]:
        return {n: StepMetrics(n, loss + (n == 3), 0.1, 1.0, 5, n, 0, 0) for n in (2, 3, 4)}

    def chain(state: str) -> StateChain:
        link = ChainLink(4, "c", state, "r", {})
        return StateChain(ChainOrigin(0, {}, "d")).add_link(link)

    its = metrics(1.0)
    assert find_difference(metrics(1.0), its, chain("s"), chain("s"), 1, 4) is None
    found = find_difference(metrics(1.0), its, chain("s"), chain("t"), 1, 4)
    assert found is not None and found.startswith("step 4 is the first that differs: parameters")
    its[3] = metrics(0.5)[3]
    found = find_difference(metrics(1.0), its, chain("s"), chain("t"), 1, 4)
    assert found == "step 3 is the first that differs: loss is 2.0, recorded 1.5"
    lost = {2: StepMetrics(2, float("nan"), 0.1, 1.0, 5, 1, 0, 0)}
    assert find_difference(lost, dict(lost), chain("s"), chain("s"), 1, 2) is None


def test_stops_after_a_number_of_steps_or_on_a_signal() -> None:
    stop = StopAfter(3, lambda: False)
    assert [stop() for _ in range(3)] == [False, False, True]
    assert StopAfter(3, lambda: True)()


def test_metrics_are_json(run_dir: Path) -> None:
    """A replay relies on decimals that read back as the same bits."""
    line = (run_dir / "metrics.jsonl").read_text().splitlines()[0]
    assert json.dumps(json.loads(line)) == line
