"""``merge`` and ``export`` of a finished run."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dist_peft.app import cli, verified_export
from dist_peft.app.commands.train import train_from_config
from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export import verify_formats
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verification_choice import count_loaded_bytes
from dist_peft.export.verify import Probe
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on an NF4 base."""
    directory = tmp_path_factory.mktemp("export")
    assert (
        train_from_config(parse_config(tiny_tree(directory, base__quant={"kind": "nf4"})), World())
        == 0
    )
    close_log()
    return directory / "run"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()
    assert torch.is_grad_enabled()


def logits(model: torch.nn.Module, probe: Probe) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=probe.input_ids).logits


def test_merge_writes_verifies_and_reports(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge", "--run", str(run_dir), "--out", str(tmp_path / "out"), "--base", "decoded"]
    assert cli.main([*argv, "--json"]) == 0
    printed, logged = capsys.readouterr()
    assert "logits against the trained model" in logged
    outcome = json.loads(printed)
    assert {key: outcome[key] for key in ("format", "path", "exact", "unpacked")} == {
        "format": "hf-bf16",
        "path": str(tmp_path / "out"),
        "exact": True,
        "unpacked": [],
    }
    assert "transformers" in outcome["loaded_by"] and outcome["comparison"]["relative"] < 0.1
    probe = Probe.load_probe(run_dir / "probe.safetensors")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    change = (probe.trained - probe.before).square().mean().sqrt()
    error = (logits(model.eval(), probe) - probe.trained).square().mean().sqrt()
    assert error < 0.1 * change  # bf16 rounding of the weights
    report = (run_dir / "report.html").read_text()
    assert "Merged into" in report and "decoded base" in report


def test_merge_compared_block_by_block(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["merge", "--run", str(run_dir), "--base", "decoded"]
    size = count_loaded_bytes(run_dir.parent / "base", torch.float32)
    monkeypatch.setattr(verified_export, "read_available_memory", lambda: size)
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded whole
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    logged = capsys.readouterr().err
    assert "will be compared block by block: loaded whole with transformers it takes" in logged
    assert "loaded by dist_peft, block by block, float32: logits against the trained" in logged
    assert "block by block" in (run_dir / "report.html").read_text()

    monkeypatch.setattr(verified_export, "read_available_memory", lambda: size - 1)
    assert cli.main([*argv, "--out", str(tmp_path / "other"), "--verify", "consumer"]) == 2
    assert "pass --verify blocks" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_merge_without_verifying(run_dir: Path, tmp_path: Path) -> None:
    before = (run_dir / "report.html").read_bytes()
    outcome = merge_finished_run(run_dir, tmp_path / "out", verify=None)
    assert outcome.consumer is None and outcome.to_json()["comparison"] is None
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (run_dir / "report.html").read_bytes() == before


def test_hf_format_is_a_merge(run_dir: Path, tmp_path: Path) -> None:
    argv = ["export", "--format", "hf-bf16", "--run", str(run_dir), "--no-verify"]
    assert cli.main([*argv, "--out", str(tmp_path / "a")]) == 0
    merge_finished_run(run_dir, tmp_path / "b", verify=None)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_peft_format_is_an_adapter_that_peft_loads(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    argv = ["export", "--format", "peft", "--run", str(run_dir), "--out", str(out)]
    assert cli.main(argv) == 0
    base = tf.AutoModelForCausalLM.from_pretrained(run_dir.parent / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base, out).eval()
    probe = Probe.load_probe(run_dir / "probe.safetensors")
    found = logits(adapted, probe)
    with adapted.disable_adapter():
        plain = logits(adapted, probe)
    change = probe.trained - probe.before
    cosine = torch.cosine_similarity((found - plain).flatten(), change.flatten(), 0)
    assert cosine > 0.9  # on another (unquantized) base: nearly the same change
    assert cli.main(argv) == 2  # not empty any more


def test_run_that_did_not_finish(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        merge_finished_run(tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="did not finish; resume it first"):
        merge_finished_run(tmp_path, tmp_path / "out")


def test_several_processes_are_refused(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["merge", "--run", str(run_dir), "--out", str(tmp_path / "out")])
    assert "runs in one process, not 2" in capsys.readouterr().err


def copied(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def test_adapter_of_other_weights_of_the_same_shape_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(run_dir, tmp_path)
    base = shutil.copytree(run_dir.parent / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(run_dir.parent / "base"), str(base)))
    assert cli.main(["merge", "--run", str(run), "--out", str(tmp_path / "out")]) == 2
    assert f"was trained on another base than {base}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [["merge"], ["export", "--format", "peft"]], ids=str)
def test_places_that_cannot_be_written(
    verb: list[str], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out, words in (("file", "is a file; choose a new directory"), ("file/x", "cannot write")):
        assert cli.main([*verb, "--run", str(run_dir), "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err


def test_damaged_adapter_is_not_exported(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(run_dir, tmp_path)
    argv = ["export", "--format", "peft", "--run", str(run), "--out", str(tmp_path / "out")]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "r": "x"}))
    assert cli.main(argv) == 2
    assert 'says r "x", and the adapter was trained with' in capsys.readouterr().err
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = run / "adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert cli.main(argv) == 2
    assert f"{tensors} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_verified_is_not_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(run_dir, tmp_path)
    (run / "probe.safetensors").write_bytes(b"x")
    argv = ["merge", "--run", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "probe.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*argv, "--no-verify"]) == 0


@pytest.fixture(scope="module")
def qalora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished QA-LoRA run; the linears of 104 inputs cannot be pooled."""
    directory = tmp_path_factory.mktemp("qalora")
    changes = {
        "base__quant": {"kind": "int", "bits": 4, "group_size": 32},
        "adapter": {
            "kind": "qalora",
            "r": 4,
            "alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
        },
    }
    assert train_from_config(parse_config(tiny_tree(directory, **changes)), World()) == 0
    close_log()
    return directory / "run"


def test_list_of_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "--list"])
    out = capsys.readouterr().out
    for name in ("hf-bf16", "peft", "bnb-nf4", "gptq", "compressed-tensors", "mlx", "gguf"):
        assert f"| `{name}`" in out
    assert "compared with the trained model by" in out and "transformers (installed)" in out
    for argv in (["--list", "--json"], ["--json", "--list"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["export", *argv])
        facts = {each["format"]: each for each in json.loads(capsys.readouterr().out)}
        assert facts["hf-bf16"]["compared_by"][0]["missing"] == []


@pytest.mark.parametrize("name", ["hf-metal", "compressed-tensors"])
def test_qalora_is_exported_exactly(
    name: str, qalora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--run", str(qalora_run), "--out", str(tmp_path / "out"), "--format", name]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "loaded by transformers" in err and " 0.00% of the change by training" in err
    assert "2 linears stay float32" in err and "layers.0.mlp.down_proj" in err
    assert f"Export {name}" in (qalora_run / "report.html").read_text()


def test_nf4_run_as_bitsandbytes_model(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--run", str(run_dir), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--format", "bnb-nf4", "--bits", "2", "--lossy"]) == 0
    err = capsys.readouterr().err
    assert "bitsandbytes" in err and "of the change by training" in err
    assert "--bits has no effect on format bnb-nf4" in err
    assert "--lossy has no effect on format bnb-nf4" in err


def test_merge_into_integer_zeros_is_refused(
    qalora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--run", str(qalora_run), "--out", str(tmp_path / "out"), "--merge"]
    assert cli.main([*argv, "--format", "gptq"]) == 2
    assert "integer zeros" in capsys.readouterr().err
    assert cli.main([*argv, "--format", "compressed-tensors", "--lossy"]) == 0
    err = capsys.readouterr().err
    assert "of the change by training" in err and " 0.00% of" not in err


def test_consumer_that_is_not_installed_is_named(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dist_peft.export.verify_formats.find_spec", lambda name: None)
    monkeypatch.delenv("DIST_PEFT_MLX_PYTHON", raising=False)
    argv = ["export", "--run", str(run_dir), "--out", str(tmp_path / "out"), "--format", "mlx"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "NOT VERIFIED: mlx-lm is not installed; pip install 'mlx[cpu]' mlx-lm" in err
    assert cli.main([*argv[:-1], "gguf"]) == 2  # its directory is taken by now
    assert "not empty" in capsys.readouterr().err


def test_tokenizer_that_gguf_cannot_name(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--run", str(run_dir), "--out", str(tmp_path / "a.gguf"), "--format", "gguf"]
    assert cli.main(argv) == 2
    assert "it is of type WordLevel" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_qalora_adapters(qalora_run: Path, tmp_path: Path) -> None:
    """Plain PEFT loads the expanded adapter and computes what training changed."""
    for name in ("peft", "peft-expanded"):
        argv = ["export", "--run", str(qalora_run), "--out", str(tmp_path / name)]
        assert cli.main([*argv, "--format", name]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["use_qalora"]
    base = tf.AutoModelForCausalLM.from_pretrained(qalora_run.parent / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft-expanded").eval()
    probe = Probe.load_probe(qalora_run / "probe.safetensors")
    found = logits(adapted, probe)
    with adapted.disable_adapter():
        change = found - logits(adapted, probe)
    wanted = (probe.trained - probe.before).flatten()
    assert torch.cosine_similarity(change.flatten(), wanted, 0) > 0.9


# -- verdicts ----------------------------------------------------------------------------------


def damage_probe(run: Path, how: str) -> None:
    """Another trained model, whose logits the export cannot have."""
    probe = Probe.load_probe(run / "probe.safetensors")
    change = probe.trained - probe.before
    if how == "another base":
        far = 11 * change.roll(1, -1)
        Probe(probe.input_ids, probe.trained + far, probe.before + far).save_probe(
            run / "probe.safetensors"
        )
        return
    trained = {
        "slightly": probe.trained + 0.2 * change.roll(1, -1),
        "nan": probe.trained * torch.nan,
        "lost": probe.before - change,
    }[how]
    Probe(probe.input_ids, trained, probe.before).save_probe(run / "probe.safetensors")


@pytest.mark.parametrize("how", ["slightly", "another base", "nan", "lost"])
@pytest.mark.parametrize(
    ("form", "exact"),
    [
        (["merge", "--base", "decoded"], True),
        (["merge"], False),
        (["export", "--format", "peft"], True),
        (["export", "--format", "hf-metal"], False),
    ],
    ids=["decoded", "original", "peft", "hf-metal"],
)
def test_lora_that_is_not_what_was_trained(
    form: list[str],
    exact: bool,
    how: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copied(run_dir, tmp_path)
    damage_probe(run, how)
    argv = [*form, "--run", str(run), "--out", str(tmp_path / "out")]
    fails = exact or how != "slightly"
    assert cli.main(argv) == int(fails)
    err = capsys.readouterr().err
    assert ("was written and is kept" in err) == fails
    assert fails or "of the change by training on the probe" in err
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", ["hf-metal", "compressed-tensors", "peft-expanded"])
def test_qalora_that_is_not_what_was_trained(
    name: str, qalora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(qalora_run, tmp_path)
    argv = ["export", "--format", name, "--run", str(run), "--out"]
    damage_probe(run, "slightly")
    assert cli.main([*argv, str(tmp_path / "a")]) == 1
    assert "keeps the trained function and may differ by at most 5.0%" in capsys.readouterr().err
    assert cli.main([*argv, str(tmp_path / "b"), "--max-error", "0.5"]) == 0


def test_bound_of_the_user(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge", "--run", str(run_dir), "--base", "decoded", "--out"]
    assert cli.main([*argv, str(tmp_path / "a"), "--max-error", "1e-6"]) == 1
    assert "--max-error allows at most 0.0%" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*argv, str(tmp_path / "b"), "--max-error", "nan"])
    assert cli.main([*argv, str(tmp_path / "c"), "--max-error", "1", "--no-verify"]) == 0
    assert "--max-error has no effect with --no-verify" in capsys.readouterr().err


def test_consumer_that_takes_too_long(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A library that compiles, and one that loads in this process."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 30 & wait\n")
    slow.chmod(0o755)
    monkeypatch.setenv("DIST_PEFT_MLX_PYTHON", str(slow))
    argv = ["--run", str(run_dir), "--verify-minutes", "0.005", "--out"]
    assert cli.main(["export", "--format", "mlx", *argv, str(tmp_path / "mlx")]) == 0
    err = capsys.readouterr().err
    assert "with mlx_lm, for at most 0.005 minutes" in err
    assert "NOT VERIFIED: mlx did not load it within 0.005 minutes" in err
    argv[3] = "0.0001"
    assert cli.main(["merge", *argv, str(tmp_path / "merged")]) == 0
    assert "NOT VERIFIED: loading it with transformers took longer" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_types_of_merged_weights(
    dtype: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["merge", "--run", str(run_dir), "--out", str(out), "--base", "decoded"]
    assert cli.main([*argv, "--dtype", dtype]) == 0
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert (" 0.00% of the change by training" in capsys.readouterr().err) == (dtype == "float32")


def test_only_what_belongs_to_an_adapter_is_exported(run_dir: Path, tmp_path: Path) -> None:
    run, out = copied(run_dir, tmp_path), tmp_path / "out"
    (tmp_path / "key").write_text("secret")
    (run / "adapter" / "notes.txt").symlink_to(tmp_path / "key")
    (run / "adapter" / ".env").write_text("TOKEN=1")
    (run / "adapter" / "pytorch_model.bin").write_text("pickle")
    argv = ["export", "--format", "peft", "--run", str(run), "--out", str(out)]
    assert cli.main(argv) == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "dist_peft.json",
    }
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_bitsandbytes_that_fails_on_this_machine(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What plain transformers cannot run, as a user would, is not called loaded."""

    def fail(*args: object) -> None:
        raise VerificationError("bnb-nf4 cannot load it:\nAssertionError: N % block_n")

    monkeypatch.setattr(verify_formats.ProcessConsumer, "compute_logits", fail)
    argv = ["export", "--run", str(run_dir), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--format", "bnb-nf4"]) == 0
    err = capsys.readouterr().err
    assert "NOT VERIFIED: plain transformers with bitsandbytes cannot run" in err
    assert "AssertionError: N % block_n" in err and "of the change by training" in err
    assert "loaded by" not in err
