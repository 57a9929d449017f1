"""``dist-peft switch`` on real weights: bits of exports with float biases, roundings of merges."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.app import cli
from dist_peft.core.config.io import load_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.story_runs import run_config, train

pytestmark = [pytest.mark.data, pytest.mark.e2e]

TARGETS = ["q_proj", "v_proj", "up_proj"]
LORA = {"kind": "lora", "r": 5, "alpha": 10}
QALORA = {"kind": "qalora", "r": 3, "alpha": 6, "target_modules": TARGETS}


def train_run(shared_data: Path, directory: Path, name: str, **changes: Any) -> Path:
    """Two large steps, so that the adapter is above the rounding of its merge."""
    run = directory / name
    tree = run_config(
        shared_data,
        directory,
        **{
            "train__steps": 2,
            "train__lr": 3e-2,
            "train__warmup": 0,
            "train__global_batch": 2,
            "save": {"dir": str(run), "every": 0},
            **changes,
        },
    )
    assert train(World(), tree) == 0
    close_log()
    return run


def call(*argv: object) -> int:
    code = cli.main([str(a) for a in argv])
    close_log()
    return code


def read_weights(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(("bits", "solver"), [(4, "rtn"), (3, "hqq")])
def test_exports_with_float_biases_switch_bit_for_bit(
    shared_data: Path, tmp_path: Path, bits: int, solver: str
) -> None:
    quant = {"kind": "int", "bits": bits, "group_size": 32, "solver": solver}
    runs = {
        name: train_run(
            shared_data, tmp_path, name, adapter=QALORA, base__quant=quant, train__seed=seed
        )
        for seed, name in enumerate("ab")
    }
    exports = {}
    for name, run in runs.items():
        exports[name] = tmp_path / f"export {name}"
        argv = ("--format", "hf-metal", "--out", exports[name], "--no-verify")
        assert call("export", "--run", run, *argv) == 0
    steps = [("a", "b"), ("b", "none"), ("none", "a")]
    at = exports["a"]
    for number, (source, target) in enumerate(steps):
        out = tmp_path / f"switched {number}"
        options = [*("--from", runs.get(source, "none")), *("--to", runs.get(target, "none"))]
        verify = [] if target == "a" else ["--no-verify"]  # by transformers, with its kernel
        assert call("switch", "--merged", at, *options, "--out", out, *verify) == 0
        if target in exports:
            assert read_weights(out) == read_weights(exports[target])
            for file in ("config.json", "generation_config.json", "merge_record.json"):
                assert (out / file).read_text() == (exports[target] / file).read_text(), file
        at = out
    assert read_weights(tmp_path / "switched 1") not in map(read_weights, exports.values())
    assert (
        json.loads((tmp_path / "switched 1" / "merge_record.json").read_text())["adapter"] is None
    )


@pytest.fixture(scope="module")
def lora_runs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs ``a`` and ``b``, ``dora`` and ``ia3``."""
    directory = tmp_path_factory.mktemp("lora")
    quant = {"base__quant": None}
    runs = {
        name: train_run(shared_data, directory, name, adapter=LORA, train__seed=seed, **quant)
        for seed, name in enumerate("ab")
    }
    dora = {**LORA, "use_dora": True}
    runs["dora"] = train_run(shared_data, directory, "dora", adapter=dora, **quant)
    runs["ia3"] = train_run(shared_data, directory, "ia3", adapter={"kind": "ia3"}, **quant)
    return runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_switch_up_to_two_roundings(
    lora_runs: dict[str, Path], tmp_path: Path, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = lora_runs["a"], lora_runs["b"]
    merged = {name: tmp_path / f"merged {name}" for name in "ab"}
    for name, out in merged.items():
        argv = ("--out", out, "--dtype", dtype, "--no-verify")
        assert call("merge", "--run", lora_runs[name], *argv) == 0
    capfd.readouterr()
    out = tmp_path / "switched"
    assert call("switch", "--merged", merged["a"], "--from", a, "--to", b, "--out", out) == 0
    told = capfd.readouterr().err
    assert "loaded by transformers" in told and "rounded twice: " in told
    found, direct, before = map(read_tensors, (out, merged["b"], merged["a"]))
    assert found.keys() == direct.keys()
    errors, changes = [], []
    for name, value in direct.items():
        assert found[name].dtype == value.dtype
        if torch.equal(before[name], value):  # no adapter
            assert torch.equal(found[name], value)
        errors.append((found[name].double() - value.double()).square().sum())
        changes.append((before[name].double() - value.double()).square().sum())
    share = float((sum(errors) / sum(changes)) ** 0.5)
    print(f"{dtype}: {share:.2e} of the difference between the tasks")
    assert 0 < share < (0.05 if dtype == "bfloat16" else 1e-5)
    back = tmp_path / "back"
    none = tmp_path / "none"
    argv = ("--from", b, "--to", "none", "--out", none)
    assert call("switch", "--merged", out, *argv) == 0
    shown = capfd.readouterr().err
    assert "logits against the untrained base: " in shown and "(trained model " in shown
    argv = ("--from", "none", "--to", a, "--out", back)
    assert call("switch", "--merged", none, *argv) == 0
    assert call("switch", "--merged", back, *argv, "--overwrite") == 2


def test_dora_comes_and_ia3_comes_and_goes(
    lora_runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compared with each run's probe by transformers, and at the end with the base's weights."""
    at = tmp_path / "a"
    argv = ("--dtype", "float32", "--no-verify")
    assert call("merge", "--run", lora_runs["a"], "--out", at, *argv) == 0
    for source, target in (("a", "ia3"), ("ia3", "none"), ("none", "dora")):
        options = ("--from", lora_runs.get(source, "none"), "--to", lora_runs.get(target, "none"))
        out = tmp_path / target
        assert call("switch", "--merged", at, *options, "--out", out, "--max-error", "1e-3") == 0
        at = out
    base = load_config(lora_runs["a"] / "config.yaml").base.path
    original = load_file(Path(base) / "model.safetensors")
    for name, value in read_tensors(tmp_path / "none").items():
        torch.testing.assert_close(value, original[name].float(), rtol=1e-5, atol=1e-6)
    capfd.readouterr()
    options = ("--from", lora_runs["dora"], "--to", "none")
    assert call("switch", "--merged", at, *options, "--out", tmp_path / "o") == 2
    assert "it cannot be taken out again" in capfd.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_cannot_switch_is_refused(
    lora_runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = (lora_runs[name] for name in "ab")
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert call("merge", "--run", a, "--out", merged, "--no-verify") == 0

    def refuse(text: str, *argv: object, directory: Path = merged) -> None:
        capfd.readouterr()
        assert call("switch", "--merged", directory, "--out", out, *argv) == 2
        told = capfd.readouterr().err
        assert text in told and "Traceback" not in told, told
        assert not out.exists() and not list(tmp_path.glob(".*"))

    refuse("holds another adapter than --from", "--from", b, "--to", a)
    refuse("holds another adapter than --from none", "--from", "none", "--to", a)
    refuse("nothing to switch", "--from", "none", "--to", "none")
    refuse("is no directory", "--from", a, "--to", b, directory=tmp_path / "absent")
    refuse("has no merge_record.json", "--from", a, "--to", b, directory=a / "adapter")
    zeros = tmp_path / "zeros"
    shutil.copytree(merged, zeros)
    record = json.loads((zeros / "merge_record.json").read_text())
    content = record["base"]["base_content"]
    others = {name: value[:-4] + "0000" for name, value in content["tensors"].items()}
    other = {**record["base"], "base_content": {**content, "tensors": others}}
    decoded = {"state": "decoded", "base": {**record["base"], "quant": {"kind": "nf4"}}}
    for change, text in (
        ({"format": "gptq"}, "rounded after the merge"),
        ({"adapter": ""}, "trained weights of the base"),
        ({"version": 9}, "has version 9"),
        ({"stop_tokens": ["x"]}, "is damaged"),
        ({"more": 1}, "is damaged"),
        ({"base": 5}, "is damaged"),
        ({"base": other}, "was trained on another base than"),
        (decoded, "another quantization of the base"),
    ):
        (zeros / "merge_record.json").write_text(json.dumps({**record, **change}))
        refuse(text, "--from", a, "--to", b, directory=zeros)


def test_biases_of_another_directory_are_refused(
    shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quant = {"kind": "int", "bits": 4, "group_size": 32}
    run = train_run(shared_data, tmp_path, "a", adapter=QALORA, base__quant=quant)
    merged, out = tmp_path / "merged", tmp_path / "out"
    argv = ("--format", "hf-metal", "--out", merged, "--no-verify")
    assert call("export", "--run", run, *argv) == 0
    tensors = read_tensors(merged)
    name = "model.layers.0.self_attn.q_proj.qbiases"
    tensors[name][3, 1] *= 1.0001
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    assert call("switch", "--merged", merged, "--from", run, "--to", "none", "--out", out) == 2
    assert "its biases are not those of the base's zeros" in capfd.readouterr().err
    assert not out.exists()
