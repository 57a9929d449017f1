"""Runs on bases in MXFP4 and FP8: losses on 2 ranks are those of one process; merged models are
what was trained, for ``transformers``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors import safe_open

from dist_peft.app import cli
from dist_peft.core.world import World
from tests.support import packed
from tests.support.dist import run_ranks
from tests.support.equality import all_cases, assert_same
from tests.support.export_runs import mixture
from tests.support.packed_floats import (
    GPT_OSS,
    save_compressed_fp4,
    save_compressed_fp8,
    save_fp8,
    save_mxfp4,
    save_tokenized,
)
from tests.support.prequantized_models import logits
from tests.support.tiny_models import MIXTURES
from tests.support.tiny_runs import tiny_tree, train

Trees = dict[str, dict[str, Any]]
ODD = {"r": 3, "alpha": 6}


def make_trees(root: Path) -> Trees:
    """Prequantized bases, with adapters on every linear and expert; unquantized ones by kind."""
    oss = save_tokenized(GPT_OSS, root / "oss")
    moe = save_tokenized(MIXTURES["qwen3_moe"], root / "moe")
    bases = {
        "gpt-oss, mxfp4": save_mxfp4(oss, root / "oss4"),
        "gpt-oss": oss,
        "experts, fp8": save_fp8(moe, root / "moe8", (24, 32)),
    }
    trees: Trees = {}
    for number, (case, base) in enumerate(bases.items()):
        (own := root / str(number)).mkdir()
        section: dict[str, Any] = {"path": str(base), "compute_dtype": "float32"}
        if base is oss:
            section["quant"] = {"kind": "mxfp4"}
        trees[case] = tiny_tree(own, base=section, adapter=ODD)
    (own := root / "fp8").mkdir()
    trees["fp8"] = tiny_tree(own, base__quant={"kind": "fp8", "group_size": 40}, adapter=ODD)
    return trees


@pytest.mark.dist
def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    trees = make_trees(tmp_path)
    del trees["gpt-oss"]
    expected = all_cases(World(), trees)
    sharded = {c: {**t, "engine": {"kind": "fsdp2"}} for c, t in trees.items()}
    for outcome in run_ranks(all_cases, 2, sharded, timeout=300):
        for case, found in outcome.items():
            assert_same(found, expected[case])


@pytest.mark.e2e
def test_merged_models_are_those_that_were_trained(tmp_path: Path) -> None:
    """Into bfloat16, in transposed tensors as transformers has them, without the quantization."""
    trees = make_trees(tmp_path)
    plain = packed.save_plain(tmp_path / "plain")
    others: dict[str, Callable[[Path, Path], Path]] = {
        "a scale a row": save_compressed_fp8,
        "nvfp4": save_compressed_fp4,
        "mxfp4": lambda p, o: save_compressed_fp4(p, o, "mxfp4"),
        "act-order": lambda p, o: packed.save_gptq(p, o, act_order=True),
        "llm.int8": lambda p, o: packed.save_bnb(p, o, double_quant=False, kind="int8"),
        "bnb fp4": lambda p, o: packed.save_bnb(p, o, double_quant=True, kind="fp4"),
    }
    for case, save in others.items():
        base = {"path": str(save(plain, tmp_path / case)), "compute_dtype": "float32"}
        (own := tmp_path / f"{case} run").mkdir()
        trees[case] = tiny_tree(own, base=base, adapter=ODD)
    mixed = save_tokenized(mixture("qwen3_moe"), tmp_path / "mixed")
    stacks: dict[str, Callable[[Path, Path], Path]] = {
        "experts, act-order": lambda p, o: packed.save_gptq(p, o, act_order=True),
        "experts, awq": packed.save_awq,
        "experts, nvfp4": save_compressed_fp4,
        "experts, bitsandbytes": lambda p, o: packed.save_bnb(p, o, double_quant=True),
    }
    for case, save in stacks.items():
        base = {"path": str(save(mixed, tmp_path / case)), "compute_dtype": "float32"}
        (own := tmp_path / f"{case} run").mkdir()
        trees[case] = tiny_tree(own, base=base, adapter=ODD)
    (own := tmp_path / "through").mkdir()
    through = {**ODD, "through_quantizer": True}
    trees["through nvfp4"] = tiny_tree(own, base__quant={"kind": "nvfp4"}, adapter=through)
    for case, tree in trees.items():
        assert train(tree) == 0, case
        run = Path(tree["save"]["dir"])
        out = run.parent / "merged"
        command = ["merge", "--run", str(run), "--out", str(out), "--base", "decoded"]
        assert cli.main([*command, "--dtype", "float32", "--max-error", "1e-3"]) == 0, case
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        model = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with safe_open(out / "model.safetensors", "pt") as files:
            names = {n for n in files.keys() if "proj" in n}  # noqa: SIM118
            assert all(files.get_slice(n).get_dtype() == "F32" for n in names)
            if "gpt-oss" in case:
                stack = "model.layers.0.mlp.experts.gate_up_proj"
                assert torch.equal(files.get_tensor(stack), model.get_parameter(stack))


@pytest.mark.e2e
def test_peft_reads_adapters_of_transposed_experts(tmp_path: Path) -> None:
    base = {"path": str(save_tokenized(GPT_OSS, tmp_path / "oss")), "compute_dtype": "float32"}
    tree = tiny_tree(tmp_path, base={**base, "quant": None}, adapter=ODD)
    assert train(tree) == 0
    run, out = tmp_path / "run", tmp_path / "merged"
    assert cli.main(["merge", "--run", str(run), "--out", str(out), "--dtype", "float32"]) == 0
    original, merged = (
        tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (base["path"], out)
    )
    before = logits(original)
    adapted = PeftModel.from_pretrained(original, run / "adapter").eval()
    assert (logits(adapted) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-5, atol=1e-5)
