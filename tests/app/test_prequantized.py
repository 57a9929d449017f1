"""Every verb on prequantized bases: train in each engine, resume, evaluate, merge, export."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.app import cli
from dist_peft.app.model_setup import build_model
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.quant.affine import AffineCodec
from tests.support import packed
from tests.support.dist import run_ranks
from tests.support.story_runs import losses, train
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e

QALORA = {"kind": "qalora", "r": 4, "alpha": 8}
INT4 = QuantConfig(kind="int", bits=4, group_size=packed.GROUP)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    plain = packed.save_plain(root / "plain")
    return {
        "plain": plain,
        "gptq": packed.save_gptq(plain, root / "gptq"),
        "bnb": packed.save_bnb(plain, root / "bnb", double_quant=True),
    }


def tree_of(directory: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """Each step sees all eight records, so that losses of steps can be compared."""
    directory.mkdir(exist_ok=True)
    tree = tiny_tree(directory, train__global_batch=8)
    tree["train"] |= {"steps": 4, "micro_batch": 4}
    tree["save"]["every"] = 0
    tree["base"] = {"path": str(base), "compute_dtype": "float32"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree[section], name: value} if name else value
    return tree


# -- engines ---------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "bnb": {"engine": {"kind": "fsdp2"}},
    "gptq": {"engine": {"kind": "zero", "stage": 2}, "adapter": QALORA},
}


def train_all(world: World, trees: list[dict[str, Any]]) -> list[int]:
    return [train(world, tree) for tree in trees]


@pytest.mark.dist
def test_two_ranks_train_as_one(bases: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    both = [tree_of(tmp_path / name, bases[name], **case) for name, case in CASES.items()]
    assert run_ranks(train_all, 2, both) == [[0] * 2] * 2
    for name, case in CASES.items():
        one = {**case, "engine": {"kind": "single"}, "save__dir": str(tmp_path / f"{name} alone")}
        assert train(World(), tree_of(tmp_path / name, bases[name], **one)) == 0
        close_log()
        found, wanted = losses(tmp_path / name / "run"), losses(tmp_path / f"{name} alone")
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
        assert wanted[-1] < wanted[0]
        print(f"{name}: loss {wanted[0]:.4f} -> {wanted[-1]:.4f}")


# -- a QA-LoRA run on GPTQ -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after two of four steps and resumed."""
    directory = tmp_path_factory.mktemp("run")
    tree = tree_of(directory, bases["gptq"], adapter=QALORA)
    assert train(World(), tree, 2) == 75
    close_log()
    assert train(World(), tree) == 0
    close_log()
    found = losses(directory / "run")
    assert len(found) == 4 and found[-1] < found[0]
    return directory / "run"


def test_the_run_keeps_what_the_directory_is(run: Path) -> None:
    config = load_config(run / "config.yaml")
    assert config.base.quant == INT4
    about = json.loads((run / "adapter" / "dist_peft.json").read_text())
    assert about["quant"]["kind"] == "int" and about["quant"]["group_size"] == packed.GROUP
    assert build_model(resolve_config(config)).config == config


def test_eval_of_base_and_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "--config", str(run / "config.yaml")]
    assert cli.main(argv) == 0 and cli.main([*argv, "--run", str(run)]) == 0
    before, after = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert before["step"] == 0 and after["step"] == 4
    assert before["eval_loss"] != after["eval_loss"]


def test_codes_are_kept_and_the_merge_is_exact(
    run: Path, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec, plain = AffineCodec(4, packed.GROUP), load_file(bases["plain"] / "model.safetensors")
    config = load_config(run / "config.yaml")
    with open_merged_weights(config.base, bases["gptq"], run / "adapter", "codes") as walk:
        for weight in (w for w in walk.weights if w.is_block_linear):
            span = next(iter(walk.iterate_spans(weight)))
            found = walk.read_affine_parts(weight, span)
            wanted = codec.split_packed_rows(
                codec.quantize_to_packed(plain[weight.name]), weight.num_columns
            )
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scale, wanted.scale)
            assert not torch.equal(found.zero, wanted.zero.float())
        walk.check_all_consumed()
    out = tmp_path / "out"
    argv = ["export", "--format", "hf-metal", "--run", str(run), "--out", str(out)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().err
    assert "codes kept, adapter in the biases" in text and "logits against the trained" in text
    probe = Probe.load_probe(run / "probe.safetensors")
    model = tf.AutoModelForCausalLM.from_pretrained(out, device_map="cpu", dtype="auto").eval()
    with torch.no_grad():
        error = compare_logits(model(input_ids=probe.input_ids, use_cache=False).logits, probe)
    print(f"QA-LoRA on GPTQ, merged: {error}")
    assert error.relative < 1e-3


def test_exported_as_gptq_it_is_the_base_again(
    run: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["export", "--format", "gptq", "--run", str(run), "--out", str(out), "--no-verify"]
    assert cli.main(argv) == 0
    found, wanted = (load_file(d / "model.safetensors") for d in (out, bases["gptq"]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (out / "adapter" / "adapter_config.json").is_file()


def test_merge_has_no_original(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["merge", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().err
    assert text.count("is already quantized (gptq_v2): the adapter is merged into its deq") == 1
    config = packed.read_config(tmp_path / "out")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    probe = Probe.load_probe(run / "probe.safetensors")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        error = compare_logits(model(input_ids=probe.input_ids, use_cache=False).logits, probe)
    assert error.relative < 0.1  # rounding of the weights to bf16


def test_lora_run_on_nf4_merges_and_exports(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(World(), tree_of(tmp_path / "a", bases["bnb"])) == 0
    run = ["--run", str(tmp_path / "a" / "run"), "--out"]
    assert cli.main(["merge", *run, str(tmp_path / "merged"), "--base", "decoded"]) == 0
    assert "logits against the trained model" in capsys.readouterr().err
    out = str(tmp_path / "bnb")
    assert cli.main(["export", "--format", "bnb-nf4", "--no-verify", *run, out]) == 0
    settings = packed.read_config(tmp_path / "bnb")["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] is True


def test_a_linear_without_codes_stays_out_of_integer_formats(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = packed.save_own(bases["plain"], tmp_path / "base", skip=("k_proj.weight",))
    with pytest.raises(UserError, match=r"k_proj is stored as raw.*base\.quant\.kind"):
        train(World(), tree_of(tmp_path / "a", base, adapter=QALORA))
    targets = {**QALORA, "target_modules": ["q_proj", "down_proj"]}
    assert train(World(), tree_of(tmp_path / "a", base, adapter=targets)) == 0
    out = tmp_path / "out"
    argv = ["export", "--format", "compressed-tensors", "--run", str(tmp_path / "a" / "run")]
    assert cli.main([*argv, "--out", str(out)]) == 0
    names = load_file(out / "model.safetensors").keys()
    assert {n for n in names if "k_proj" in n} == {
        f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)
    }
    config = parse_config(tree_of(tmp_path / "b", out, adapter=targets))
    prepared = build_model(resolve_config(config))
    assert prepared.config.base.quant == INT4  # and what we wrote is a base again


def test_inspect_says_how_a_base_is_quantized(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(bases["gptq"])]) == 0
    assert "quantized    gptq_v2: int, 4 bits, group_size 32" in capsys.readouterr().out
    other = packed.copy(bases["gptq"], tmp_path / "other")
    packed.change_settings(other, quant_method="hqq")
    assert cli.main(["inspect", str(other)]) == 0
    assert "quantized    no base to train on:" in capsys.readouterr().out
