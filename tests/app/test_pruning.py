"""``dist-peft prune``: the papers' masks, equal bytes on any number of ranks, refusals."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from dist_peft.app import cli
from dist_peft.app.model_setup import build_model
from dist_peft.app.quantized_base import load_calibration_sequences
from dist_peft.app.resolved_config import resolve_pruning
from dist_peft.compress.prune_driver import _SparseGptPruner
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.quant.codec import make_codec
from dist_peft.quant.sparsity import Sparsity
from tests.support.dist import call_in_process, run_ranks
from tests.support.pruning_runs import (
    CALIBRATION,
    iterate_reference_weights,
    make_pruning_tree,
    write_pruned,
)
from tests.support.tiny_runs import save_config, train

pytestmark = pytest.mark.e2e


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return make_pruning_tree(tmp_path)


RUNS = [
    ("magnitude", "0.5"),
    ("wanda", "0.5"),
    ("sparsegpt", "0.6"),
    ("sparsegpt", "2:4"),
    ("blocks", "0.5"),
]


def prune_all(world: World, tree: dict[str, Any], out: Path, engine: dict[str, Any]) -> None:
    for method, sparsity in RUNS:
        write_pruned(
            world, {**tree, "engine": engine}, out / f"{method}-{sparsity}", method, sparsity
        )
    write_pruned(world, {**tree, "engine": engine}, out / "blocks", "blocks", "0.5")


@pytest.mark.dist
def test_bytes_do_not_depend_on_ranks(tree: dict[str, Any], tmp_path: Path) -> None:
    prune_all(World(), tree, tmp_path / "1", {})
    run_ranks(prune_all, 2, tree, tmp_path / "2", {"kind": "zero"})
    run_ranks(prune_all, 3, tree, tmp_path / "3", {})
    for directory in (tmp_path / "1").iterdir():
        for file in ("model.safetensors", "config.json"):
            expected = (directory / file).read_bytes()
            for ranks in ("2", "3"):
                found = (tmp_path / ranks / directory.name / file).read_bytes()
                assert found == expected, (directory.name, file, ranks)
    assert not list(tmp_path.glob("?/.*"))


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_masks_are_those_of_the_papers(
    method: str, text: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    write_pruned(World(), tree, tmp_path / "out", method, text)
    setup = build_model(resolve_pruning(parse_config(tree)))
    windows = load_calibration_sequences(setup, World(), CALIBRATION)
    dense, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / part, dtype=torch.float32)
        for part in ("base", "out")
    )
    sparsity = Sparsity.parse(text)
    pairs = list(iterate_reference_weights(dense, found, windows, method, sparsity))
    assert len(pairs) == 14
    for name, reference, own in pairs:
        alike = ((own == 0) == (reference == 0)).all(1)
        if method == "wanda":
            assert alike.all(), name
        # SparseGPT: where two errors are equal up to float32's rounding, a row goes another way
        assert alike.float().mean() > 0.95, name
        torch.testing.assert_close(own[alike].double(), reference[alike], rtol=2e-3, atol=2e-4)
        if text == "2:4":
            assert ((own.view(-1, 4) == 0).sum(1) == 2).all()
        else:
            assert abs(float((own == 0).float().mean()) - 0.5) < 0.02


def test_magnitude_prunes_the_smallest_of_each_matrix(tree: dict[str, Any], tmp_path: Path) -> None:
    base = write_pruned(World(), tree, tmp_path / "whole", "magnitude", "0.25")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for name, weight in dense.items():
        if "_proj" not in name:
            assert torch.equal(base[name], weight), name
            continue
        count = int(weight.numel() * 0.25)
        smallest = weight.abs().flatten().argsort(stable=True)[:count]
        expected = weight.flatten().index_fill(0, smallest, 0).view_as(weight)
        assert torch.equal(base[name], expected), name


def test_command_and_a_run_on_its_output(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(save_config(tmp_path, tree)), tmp_path / "out"
    options = ["prune", "--config", file, "--out", str(out), "--sparsity", "0.5"]
    text = ["--calibration-samples", "3", "--calibration-tokens", "24"]
    assert cli.main([*options, *text, "--method", "blocks"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and len(config["pruning"]["dropped_blocks"]) == 1
    assert cli.main([*options, "--method", "wanda"]) == 2
    assert f"{out} is not empty; choose a new directory" in capsys.readouterr().err
    close_log()


def test_zeros_kept_by_a_merge(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on a 2:4 base: the merged model has the pattern, and the lost share is reported."""
    write_pruned(World(), tree, tmp_path / "sparse", "magnitude", "2:4")
    tree["base"] |= {"path": str(tmp_path / "sparse")}
    assert train(tree) == 0
    merge = ["merge", "--run", str(tmp_path / "run"), "--dtype", "float32", "--out"]
    assert cli.main([*merge, str(tmp_path / "kept"), "--keep-zeros"]) == 0
    told = capsys.readouterr()
    assert "zeros kept" in told.out + told.err
    assert re.search(r"an error of \d+\.\d% of the change by training", told.out + told.err)
    assert cli.main([*merge, str(tmp_path / "dense")]) == 0
    base, kept, dense = (
        load_file(tmp_path / part / "model.safetensors") for part in ("sparse", "kept", "dense")
    )
    for name, weight in base.items():
        if "_proj" in name:
            assert torch.equal(kept[name], dense[name].masked_fill(weight == 0, 0)), name
            assert (dense[name] != 0).float().mean() > 0.99
    assert cli.main([*merge, str(tmp_path / "o"), "--keep-zeros", "--base", "decoded"]) == 2
    assert "--keep-zeros takes zeros from the base's files" in capsys.readouterr().err
    close_log()


KEPT = {"kind": "lora", "r": 3, "alpha": 6, "dropout": 0.1, "keep_zeros": True}


@pytest.fixture
def sparse(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run that keeps the zeros of a 2:4 base."""
    write_pruned(World(), tree, tmp_path / "sparse", "magnitude", "2:4")
    tree["base"] |= {"path": str(tmp_path / "sparse")}
    tree["train"] |= {"steps": 3, "lr": 3e-2, "warmup": 0}
    return {**tree, "adapter": KEPT}


def test_zeros_kept_in_training_are_those_of_the_merge(
    sparse: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged model is the trained one and 2:4."""
    assert train(sparse) == 0
    assert "50.0 % of the weights of 14 linears are zero and stay zero" in capsys.readouterr().err
    run, merged = tmp_path / "run", tmp_path / "merged"
    merge = ["merge", "--run", str(run), "--dtype", "float32", "--out", str(merged)]
    assert cli.main([*merge, "--max-error", "1e-4"]) == 0  # of the change by training
    base, kept = (load_file(path / "model.safetensors") for path in (tmp_path / "sparse", merged))
    for name, weight in base.items():
        if "_proj" in name:
            assert torch.equal(kept[name] == 0, weight == 0), name
            assert (kept[name] != weight)[weight != 0].float().mean() > 0.99
        else:
            assert torch.equal(kept[name], weight), name

    adapter = run / "adapter"
    with pytest.raises((KeyError, ValueError), match="MASKED_LORA"):
        PeftConfig.from_pretrained(adapter)
    export = ["export", "--run", str(run), "--format", "peft", "--out", str(tmp_path / "o")]
    assert cli.main(export) == 2
    assert "PEFT would apply the whole of it" in capsys.readouterr().err
    close_log()


@pytest.mark.parametrize("into", ["decoded", "original"])
def test_zeros_kept_on_a_quantized_base(
    into: str, sparse: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zeros are those that training saw, which are more than those of the files."""
    sparse["base"]["quant"] = {"kind": "int", "bits": 2, "group_size": 16}
    assert train(sparse) == 0
    merged = tmp_path / "merged"
    merge = ["merge", "--run", str(tmp_path / "run"), "--dtype", "float32", "--out", str(merged)]
    bound = ["--max-error", "1e-4"] if into == "decoded" else []
    assert cli.main([*merge, "--base", into, *bound]) == 0
    config, files = parse_config(sparse), load_file(tmp_path / "sparse" / "model.safetensors")
    codec = make_codec(config.base.quant, torch.float32)
    for name, found in load_file(merged / "model.safetensors").items():
        if "_proj" not in name:
            continue
        weight = files[name]
        seen = codec.dequantize_rows(
            codec.quantize_to_packed(weight), weight.shape[1], torch.float32
        )
        assert (seen == 0)[weight == 0].all() and (seen == 0)[weight != 0].any()
        kept = seen if into == "decoded" else weight
        assert torch.equal(found[seen == 0], kept[seen == 0]), name
        assert (found != kept)[seen != 0].float().mean() > 0.99
    close_log()


def test_a_model_with_zeros_switches_and_keeps_them(
    sparse: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From one run to another, whose merge it is then, and back to the pruned base."""
    runs = {}
    for seed, name in enumerate("ab"):
        runs[name] = {**sparse, "save": {"dir": str(tmp_path / name), "every": 0}}
        runs[name]["train"] = {**sparse["train"], "seed": seed}
        assert train(runs[name]) == 0
        merge = ["merge", "--run", str(tmp_path / name), "--dtype", "float32", "--no-verify"]
        assert cli.main([*merge, "--out", str(tmp_path / f"merged {name}")]) == 0
    at = tmp_path / "merged a"
    for source, target, expected in (("a", "b", "merged b"), ("b", "none", "sparse")):
        out = tmp_path / f"to {target}"
        names = [str(tmp_path / name) if name != "none" else name for name in (source, target)]
        argv = ["switch", "--merged", str(at), "--from", names[0], "--to", names[1]]
        assert cli.main([*argv, "--out", str(out), "--max-error", "1e-4"]) == 0
        found, right = (load_file(p / "model.safetensors") for p in (out, tmp_path / expected))
        for name, value in right.items():
            assert torch.equal(found[name] == 0, value == 0), name
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        at = out
    shown = capsys.readouterr().err
    assert "logits against the untrained base" in shown
    close_log()


def test_where_no_zeros_can_be_kept(sparse: dict[str, Any], tmp_path: Path) -> None:
    for changes, words in (
        ({"use_dora": True}, "does not go with use_dora"),
        ({"init": "pissa"}, "does not go with init: pissa"),
        ({"init": "lora_ga"}, "does not go with init: lora_ga"),
    ):
        with pytest.raises(UserError, match=words):
            parse_config({**sparse, "adapter": {**KEPT, **changes}})
    quant = {"kind": "int", "group_size": 16, "solver": "hqq"}
    with pytest.raises(UserError, match="solver hqq need not store a zero as zero"):
        parse_config({**sparse, "base": {**sparse["base"], "quant": quant}})
    with pytest.raises(UserError, match="no weight of the 14 adapted linears is zero"):
        train({**sparse, "base": {**sparse["base"], "path": str(tmp_path / "base")}})
    assert not (tmp_path / "run" / "adapter").exists()
    close_log()


@pytest.mark.parametrize(
    ("method", "sparsity", "changes", "message"),
    [
        ("wanda", "2:5", {}, r"groups of 5 weights, which do not divide the 64 columns"),
        ("wanda", "0.001", {}, r"less than one weight of the 64 in a row"),
        ("blocks", "2:4", {}, r"--sparsity 2:4 is a pattern of weights"),
        ("blocks", "0.1", {}, r"drops 0 of 2 blocks; give a share of the blocks from 0\.5"),
    ],
)
def test_what_is_refused(
    method: str,
    sparsity: str,
    changes: dict[str, Any],
    message: str,
    tree: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=message):
        write_pruned(World(), {**tree, **changes}, tmp_path / "o", method, sparsity)
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_classifiers_and_quantized_bases_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**config, "quantization_config": packed})
    )
    with pytest.raises(UserError, match="quantized"):
        write_pruned(World(), tree, tmp_path / "o", "magnitude", "0.5")
    tree["base"]["head"] = "classifier"
    source = {"path": tree["data"]["train"][0], "format": "classification", "labels": ["a", "b"]}
    tree["data"] |= {"train": [source], "eval": []}
    with pytest.raises(UserError, match=r"is for language models, and base\.head is classifier"):
        write_pruned(World(), tree, tmp_path / "o", "magnitude", "0.5")
    assert not (tmp_path / "o").exists()


SOLVE_BLOCK = _SparseGptPruner._solve_block


def prune_until_killed(tree: dict[str, Any], out: Path) -> None:
    """Die in the second block, as of ``kill -9``."""

    def solve_or_die(pruner: _SparseGptPruner, number: int, block: nn.Module) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        SOLVE_BLOCK(pruner, number, block)

    with mock.patch.object(_SparseGptPruner, "_solve_block", solve_or_die):
        write_pruned(World(), tree, out, "sparsegpt", "0.5")


def test_killed_prune_leaves_no_output_and_resumes(tree: dict[str, Any], tmp_path: Path) -> None:
    """Killed in the second block; the same call then prunes that block alone."""
    with pytest.raises(EOFError):
        call_in_process(prune_until_killed, tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with mock.patch.object(_SparseGptPruner, "_solve_block", autospec=True) as solve:
        solve.side_effect = SOLVE_BLOCK
        write_pruned(World(), tree, tmp_path / "out", "sparsegpt", "0.5")
    assert [call.args[1] for call in solve.call_args_list] == [1]
    assert not list(tmp_path.glob(".*"))
    write_pruned(World(), tree, tmp_path / "whole", "sparsegpt", "0.5")
    names = [tmp_path / part / "model.safetensors" for part in ("out", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()
