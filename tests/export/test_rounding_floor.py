"""Rounding of 16-bit training told from wrong exports: figures by hand, and runs of few steps."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.app import cli, verified_export
from dist_peft.core.log import close_log
from dist_peft.export import verdict
from dist_peft.export.rounding_floor import RoundingFloor, measure_rounding_floor
from dist_peft.export.verify import Probe
from tests.support.tiny_runs import tiny_tree, train

IDS = torch.tensor([[1, 2, 3]])
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def draw(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, 500, generator=torch.Generator().manual_seed(seed))


def test_figures_by_hand() -> None:
    """Base ``o``, change ``d``, rounding of a tenth of it in both rows of the probe."""
    o, d = draw(0), draw(1)
    probe = Probe(IDS, o + d + 0.1 * draw(2), o + 0.1 * draw(3))
    size = (probe.trained - probe.before).square().mean().sqrt()
    right = measure_rounding_floor(o + d, o, probe)
    assert right.floor == pytest.approx(((0.1 * draw(3)).square().mean().sqrt() / size).item())
    assert right.error == pytest.approx(((0.1 * draw(2)).square().mean().sqrt() / size).item())
    assert right.kept == pytest.approx(1, abs=0.03) and right.explains_error(right.error * 1.4)
    for share in (0.0, 0.8, 1.2, 2.0):
        wrong = measure_rounding_floor(o + share * d, o, probe)
        assert wrong.kept == pytest.approx(share, abs=0.05)
        assert not wrong.explains_error(wrong.floor)


def test_masked_tokens_have_no_part() -> None:
    o, d = draw(0), draw(1)
    o[..., 7] = -math.inf
    found = measure_rounding_floor(o + d, o, Probe(IDS, o + d, o))
    assert found == RoundingFloor(0.0, 0.0, pytest.approx(1.0))


def make_run(root: Path, lr: float) -> Path:
    changes = {"train__lr": lr, "train__steps": 4, "train__seed": 1, "save__every": 0}
    assert train(tiny_tree(root, base__compute_dtype="bfloat16", **changes)) == 0
    close_log()
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in bf16: rounding of the merged model is a tenth of the change by training."""
    return make_run(tmp_path_factory.mktemp("few"), 5e-4)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


RIGHT = {
    "merge": (),
    "blocks": ("--verify", "blocks"),
    "float32 weights": ("--dtype", "float32"),
}


@pytest.mark.e2e
@pytest.mark.parametrize("options", RIGHT.values(), ids=RIGHT)
def test_right_merge_of_few_steps_is_verified(
    options: tuple[str, ...], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge", "--run", str(run), "--out", str(tmp_path / "out"), "--json", *options]
    assert cli.main(argv) == 0
    printed, logged = capsys.readouterr()
    outcome = json.loads(printed)
    assert outcome["comparison"]["relative"] > 0.05  # beyond the bound of exact forms
    assert outcome["rounding"]["floor"] > 0.05
    assert "verified to the rounding of 16-bit training" in logged
    assert "16-bit rounding of the base alone" in (run / "report.html").read_text()


@pytest.mark.e2e
def test_right_adapter_of_few_steps_is_verified(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--format", "peft", "--run", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    assert "verified to the rounding of 16-bit training" in capsys.readouterr().err


WRONG: dict[str, Callable[[str], float]] = {
    "lost": lambda name: 0.0,
    "twice the scaling": lambda name: 2.0,
    "a layer is left out": lambda name: 0.0 if "layers.0." in name else 1.0,
    "the last layer is left out": lambda name: 0.0 if "layers.1." in name else 1.0,
}


@pytest.mark.e2e
@pytest.mark.parametrize("how", WRONG)
def test_wrong_merge_does_not_hide_behind_rounding(
    how: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    tensors = load_file(other / ADAPTER)
    changed = {n: t * WRONG[how](n) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(changed, other / ADAPTER, {"format": "pt"})
    assert cli.main(["merge", "--run", str(other), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "may differ by at most 5.0%" in err and "verified to the rounding" not in err
    assert ("rounding does not explain it" in err) == (how != "lost")


@pytest.mark.e2e
def test_change_below_the_rounding_is_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, 1e-4)
    assert cli.main(["merge", "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "NOT VERIFIED: the rounding of 16-bit training is more" in capsys.readouterr().err


@pytest.mark.e2e
def test_base_is_computed_only_where_the_bound_is_exceeded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor on a host without the memory for it, where the error is a failure as before."""
    argv = ["merge", "--run", str(run), "--out"]
    monkeypatch.setattr(verified_export.HfBf16Export, "measure_rounding", None)  # not callable
    assert cli.main([*argv, str(tmp_path / "a"), "--max-error", "0.5"]) == 0
    monkeypatch.setattr(verdict, "EXACT_BOUND", 0.5)
    assert cli.main([*argv, str(tmp_path / "c")]) == 0
    assert "in float32" not in capsys.readouterr().err
    monkeypatch.undo()
    size = verified_export.count_loaded_bytes(run.parent / "base", torch.float32)
    monkeypatch.setattr(verified_export, "read_available_memory", lambda: size - 1)
    assert cli.main([*argv, str(tmp_path / "b"), "--verify", "consumer"]) == 1
    err = capsys.readouterr().err
    assert "the rounding of 16-bit training was not measured: float32 takes" in err
