"""Whole runs through the quantizer: engines, ranks, resuming, exports."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch.distributed.tensor.debug import CommDebugMode

from dist_peft.adapters.directory import open_adapter_merger
from dist_peft.adapters.lora.through_experts import ThroughExperts
from dist_peft.app.cli import main
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.model_setup import build_model, load_training_state, load_weights
from dist_peft.app.quantized_base import calibrate_base
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.export.formats.gguf_lora_check import LLAMA_CPP_SERVER, compare_by_llama_cpp
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.verify import Probe
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.model.frozen_linear import WeightRows
from dist_peft.model.gptq_factors import FACTORS
from dist_peft.model.hub import load_tokenizer
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.importance import EngineParameters
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.step_metrics import read_metrics
from tests.support import packed
from tests.support.dist import run_ranks
from tests.support.export_runs import (
    CONFIG,
    VOCABULARY,
    finished_run,
    fork_consumers,
    mixture,
    save_tokenizer,
)
from tests.support.packed_floats import (
    GPT_OSS,
    save_compressed_fp4,
    save_mxfp4,
    save_tokenized,
)
from tests.support.prequantized_models import linears, load
from tests.support.story_runs import losses, train
from tests.support.tiny_models import save_model
from tests.support.tiny_runs import tiny_tree

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.dist

CPU = torch.device("cpu")
NF4 = {"kind": "nf4", "double_quant": False}
INT3 = {"kind": "int", "bits": 3, "group_size": 32}
GPTQ = INT3 | {"solver": "gptq", "calibration_samples": 3, "calibration_tokens": 24}
INT2 = {"kind": "int", "bits": 2, "group_size": 32}
SINGLE = {"kind": "single"}
PACKED: dict[str, Callable[..., Path]] = {
    "gptq": packed.save_gptq,
    "awq": packed.save_awq,
    "compressed-tensors": partial(packed.save_compressed, dtype=torch.float16),
}
ENGINES: list[tuple[int, dict[str, Any]]] = [
    (2, {"kind": "fsdp2", "keep_gathered": 1}),
    (3, {"kind": "fsdp2"}),
    (2, {"kind": "zero", "stage": 1, "keep_gathered": 1}),
    (2, {"kind": "zero", "stage": 2}),
    (3, {"kind": "zero", "stage": 3}),  # last: it replaces functional.linear for good
]
STEPS, CUT = 4, 2
UNPACKED = 4


def make_tree(directory: Path, quant: dict[str, Any], **changes: Any) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    tree = tiny_tree(directory, **changes)
    save_model(tf.LlamaConfig(**CONFIG.to_dict()), directory / "base")
    tree["base"]["quant"] = quant
    tree["adapter"] = {"r": 5, "alpha": 10, "through_quantizer": True}
    tree["train"] |= {"steps": STEPS, "eps": 1e-5, "lr": 2e-2, "global_batch": 6}
    return tree


def load_twice(world: World, tree: dict[str, Any], first: Path, second: Path) -> dict[str, Any]:
    """Load two checkpoints, one after the other with a forward pass in between.

    Returns the hash of all merged bytes and the logits with the second.
    """
    config = parse_config(tree)
    setup = build_model(resolve_config(config, None))
    built = load_weights(setup, world, CPU)
    built.setup_optimizer(make_optimizer_factory(config.train, CPU))
    checkpoints = CheckpointManager(first.parent, 9, world)
    ids = torch.arange(4, 28).view(1, -1)
    found: dict[str, Any] = {}
    for path in (first, second):
        load_training_state(built, checkpoints, path, 1)
        # leaves the root, and blocks that are kept, gathered
        with inference_mode(built.model), torch.no_grad():
            found["logits"] = built.model(input_ids=ids, use_cache=False).logits
    adapter = setup.adapter
    if config.engine.kind == "fsdp2":  # A alone: every rank has its own rows of B
        with CommDebugMode() as counted:
            adapter.finish_step(1, EngineParameters(built.model, built.engine))
        layers = adapter.layers.values()
        pairs = 1 + config.adapter.through_zeros
        # columns of B are those of experts: it is gathered too
        gathers = [2 if isinstance(layer, ThroughExperts) else pairs for layer in layers]
        assert counted.get_total_counts() == sum(gathers)
    total = hashlib.sha256()
    for layer in setup.adapter.layers.values():
        # engines gather a parameter that is sharded at rest
        built.engine.overwrite_local_rows([])
        total.update(built.engine.gather_parameter(layer.base.packed).numpy().tobytes())
    return {**found, "bytes": total.hexdigest()}


Loads = list[tuple[dict[str, Any], Path, Path]]


def load_on_engines(
    world: World,
    loads: Loads,
    engines: list[dict[str, Any]],
    calibrated: tuple[dict[str, Any], Path] | None = None,
) -> list[dict[str, Any]]:
    """On the first engine all of ``loads``, on the others those of bases that are not packed.

    Args:
        calibrated: a configuration whose base is written with GPTQ's factors, and where.
    """
    if calibrated is not None:
        calibrate_base(parse_config(calibrated[0]), calibrated[1], world, CPU)
    return [
        load_twice(world, {**tree, "engine": engine}, *paths)
        for number, engine in enumerate(engines)
        for tree, *paths in (loads[:UNPACKED] if number else loads)
    ]


def hash_factors(base: Path) -> dict[str, str]:
    files = sorted((base / FACTORS).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def make_base_trees(root: Path) -> dict[str, dict[str, Any]]:
    """A configuration for each kind of base that is trained through its quantizer."""
    trees = {}
    for name, quant in {"nf4": NF4, "int3": INT3, "solver gptq": GPTQ}.items():
        trees[name] = make_tree(root / name, quant)
    trees["zeros"] = make_tree(root / "zeros", INT2)
    trees["zeros"]["adapter"]["through_zeros"] = True
    plain = packed.save_plain(root / "plain")
    for name, save in PACKED.items():
        trees[name] = make_tree(root / name, INT3)
        base = save(plain, root / name / "packed")
        trees[name]["base"] = {"path": str(base), "compute_dtype": "float32"}
        trees[name]["adapter"]["through_start_share"] = 0.25
    mixed = save_tokenized(mixture("qwen3_moe"), root / "mixed")
    trees["experts"] = make_tree(root / "experts", INT3)
    base = packed.save_gptq(mixed, root / "experts" / "packed", act_order=True)
    trees["experts"]["base"] = {"path": str(base), "compute_dtype": "float32"}
    trees["experts"]["adapter"]["through_start_share"] = 0.25
    return trees


def test_bytes_are_the_same_on_any_ranks_and_engine(tmp_path: Path) -> None:
    """From a checkpoint of one process; rows are 32, 64 and 192, which three ranks cut unevenly.
    GPTQ's factors are the same, whichever ranks have the samples."""
    trees = make_base_trees(tmp_path)
    loads: Loads = []
    for name, tree in trees.items():
        assert train(World(), tree) == 0
        run = tmp_path / name / "run"
        first, second = (run / "checkpoints" / f"step-{n:06}" for n in (3, STEPS))
        if name == "solver gptq":
            tree = {**tree, "base": {**tree["base"], "path": str(run / "base")}}
        loads.append((tree, first, second))
    expected = load_on_engines(World(), loads, [SINGLE])
    turned: Loads = [(tree, second, first) for tree, first, second in loads]
    for one, other in zip(expected, load_on_engines(World(), turned, [SINGLE]), strict=True):
        assert one["bytes"] != other["bytes"]
    assert expected[1]["bytes"] != expected[2]["bytes"]  # GPTQ chooses other codes
    for ranks in (2, 3):
        engines = [engine for size, engine in ENGINES if size == ranks]
        wanted_all = expected + expected[:UNPACKED] * (len(engines) - 1)
        extra = (trees["solver gptq"], tmp_path / "factors") if ranks == 2 else None
        for results in run_ranks(load_on_engines, ranks, loads, engines, extra, timeout=400):
            for found, wanted in zip(results, wanted_all, strict=True):
                assert found["bytes"] == wanted["bytes"]
                torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-5, atol=1e-5)
    factors = hash_factors(tmp_path / "factors")
    assert factors == hash_factors(tmp_path / "solver gptq" / "run" / "base")
    assert len(factors) == 2 * 4  # inputs of q, k, v; o; gate, up; down


def train_on_engines(world: World, trees: list[dict[str, Any]]) -> None:
    for tree in trees:
        assert train(world, tree) == 0


def count_gathered(run: Path) -> list[int]:
    return [record.bytes_gathered for record in read_metrics(run / "metrics.jsonl")]


def test_a_run_cut_on_one_engine_goes_on_on_another(tmp_path: Path) -> None:
    """single -> fsdp2 on 3 ranks, fsdp2 on 2 -> zero 3, against one process that is not cut.

    On the way: forward and backward gather as many bytes as those of plain LoRA.
    """
    whole = make_tree(tmp_path, INT3)
    assert train(World(), whole) == 0
    expected = losses(tmp_path / "run")
    assert expected[-1] < expected[0]

    def make(name: str, engine: dict[str, Any]) -> dict[str, Any]:
        return {**whole, "save": {"dir": str(tmp_path / name), "every": 0}, "engine": engine}

    assert train(World(), make("a", {"kind": "single"}), CUT) == 75
    run_ranks(train_on_engines, 3, [make("a", {"kind": "fsdp2"})])
    assert run_ranks(train, 2, make("b", {"kind": "fsdp2"}), CUT) == [75, 75]
    plain = make("plain", {"kind": "fsdp2"})
    plain["adapter"] = {**plain["adapter"], "through_quantizer": False}
    assert run_ranks(train, 2, plain, CUT) == [75, 75]
    gathered = [count_gathered(tmp_path / name) for name in ("b", "plain")]
    assert gathered[0] == gathered[1] and len(gathered[0]) == CUT and gathered[0][0]
    run_ranks(train_on_engines, 2, [make("b", {"kind": "zero", "stage": 3})])
    for name in ("a", "b"):
        torch.testing.assert_close(
            torch.tensor(losses(tmp_path / name)), torch.tensor(expected), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("gather", ["routed", "tokens"])
def test_experts_are_trained_however_their_rows_are_gathered(gather: str, tmp_path: Path) -> None:
    """In act-order, an order each; the experts that tokens chose, or none, as tokens travel."""
    tree = make_tree(tmp_path, INT3)
    mixed = save_tokenized(mixture("qwen3_moe"), tmp_path / "mixed")
    base = packed.save_gptq(mixed, tmp_path / "packed", act_order=True)
    tree["base"] = {"path": str(base), "compute_dtype": "float32"}
    tree["adapter"] |= {"through_start": "none", "target_modules": ["gate_up_proj", "down_proj"]}
    assert train(World(), tree) == 0
    save = {"dir": str(tmp_path / "ranks"), "every": 0}
    engine = {"kind": "fsdp2", "gather_experts": gather}
    run_ranks(train_on_engines, 2, [{**tree, "save": save, "engine": engine}])
    found, wanted = losses(tmp_path / "ranks"), losses(tmp_path / "run")
    assert wanted[-1] < wanted[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=0)


def test_a_start_in_8_bits_is_the_same_on_engines_and_across_a_cut(tmp_path: Path) -> None:
    """Steps 1 and 2 gather rows of 8 bits; the base is loaded again after them, in one command."""
    whole = make_tree(tmp_path, INT2)
    whole["adapter"] |= {"through_start": "8bit", "through_start_share": 0.5, "through_zeros": True}
    assert train(World(), whole) == 0
    expected = losses(tmp_path / "run")
    assert len(expected) == STEPS

    def make(name: str, engine: dict[str, Any]) -> dict[str, Any]:
        return {**whole, "save": {"dir": str(tmp_path / name), "every": 0}, "engine": engine}

    # a signal in the last step of the first phase: the resume begins with the second
    cut = make("cut", {"kind": "single"})
    assert train(World(), cut, CUT) == 75 and train(World(), cut) == 0
    sharded = {"fsdp2": {"kind": "fsdp2"}, "zero": {"kind": "zero", "stage": 2}}
    run_ranks(train_on_engines, 2, [make(*named) for named in sharded.items()])
    for name in ("cut", *sharded):
        torch.testing.assert_close(
            torch.tensor(losses(tmp_path / name)), torch.tensor(expected), rtol=1e-4, atol=0
        )
    _, early, late, last = count_gathered(tmp_path / "fsdp2")
    # rows of the embedding are those of each step's tokens
    assert early > 1.5 * late and abs(late - last) < 0.02 * late


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by quantizer."""
    adapter = {"through_quantizer": True, "use_rslora": True}
    quants = {
        "nf4": NF4,
        "int4": {"kind": "int", "bits": 4, "group_size": 32},
        "encoded by gptq": GPTQ | {"bits": 4},
    }
    quants["zeros"] = INT2 | {"solver": "gptq", "calibration_samples": 3, "calibration_tokens": 24}
    root = tmp_path_factory.mktemp("through")
    found = {}
    for name, quant in quants.items():
        (root / name).mkdir()
        zeros = {"through_zeros": True} if name == "zeros" else {}
        found[name] = finished_run(root / name, quant, adapter | zeros)
    return found


def export(run: Path, out: Path, name: str, *options: str) -> int:
    return main(["export", "--run", str(run), "--format", name, "--out", str(out), *options])


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("quant", "name", "bound"),
    [
        ("nf4", "bnb-nf4", 0.01),
        ("int4", "compressed-tensors", 0.0),
        ("int4", "hf-metal", 0.0),
        ("encoded by gptq", "compressed-tensors", 0.0),
        ("zeros", "hf-metal", 0.0),
        ("int4", "mlx", 0.01),
        ("zeros", "mlx", 0.01),
        ("int4", "gptq", 0.05),
        ("int4", "awq", 0.05),
    ],
)
def test_the_export_is_the_trained_model_for_its_own_library(
    finished: dict[str, Path],
    quant: str,
    name: str,
    bound: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No logit differs from those of the training forward, in float32, where torch multiplies the
    dequantized weights. bitsandbytes and mlx multiply in an order of their own, gptqmodel has
    float16 weights."""
    python = {"mlx": "MLX", "gptq": "GPTQ", "awq": "GPTQ"}.get(name)
    if python and f"DIST_PEFT_{python}_PYTHON" not in os.environ:
        pytest.skip(f"DIST_PEFT_{python}_PYTHON names no Python with the library")
    fork_consumers(monkeypatch)
    assert export(finished[quant], tmp_path / "out", name, "--max-error", str(bound)) == 0
    assert "NOT VERIFIED" not in caplog.text
    if name == "bnb-nf4":
        from bitsandbytes.functional import QuantState, dequantize_4bit

        stored = load_file(tmp_path / "out" / "model.safetensors")
        weight = "model.layers.0.mlp.down_proj.weight"
        rows = load_file(finished[quant].parent / "base" / "model.safetensors")[weight]
        own = open_adapter_merger(finished[quant] / "adapter")
        merged = own.compute_encoded_rows(weight, rows, Span(0, len(rows)))
        codec = Nf4Codec(64, double_quant=False)
        payload, absmax = codec.split_packed_rows(codec.quantize_to_packed(merged), rows.shape[1])
        assert torch.equal(stored[weight].flatten(), payload.flatten())
        assert torch.equal(stored[f"{weight}.absmax"], absmax.flatten())
        state = QuantState(absmax.flatten(), rows.shape, stored[f"{weight}.quant_map"], 64, "nf4")
        state.dtype = torch.float32
        dense = dequantize_4bit(stored[weight], state)
        ours = codec.dequantize_rows(codec.quantize_to_packed(merged), rows.shape[1], dense.dtype)
        assert torch.equal(dense, ours)


GGUF: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq": ("q4_1", GPTQ | {"bits": 4}, {}),
    "symmetric": ("q4_1", {"kind": "int", "bits": 4, "group_size": 32, "solver": "absmax"}, {}),
    "symmetric 8": ("q8_0", {"kind": "int", "bits": 8, "group_size": 32, "solver": "absmax"}, {}),
    "zeros": ("q4_1", INT2 | {"solver": "hqq"}, {"through_zeros": True}),
}
"""Type of the blocks, ``base.quant`` and options of the adapter."""


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Run directory and exported file by name. The files are compared by the tests."""
    pytest.importorskip("gguf")
    found = {}
    for name, (kind, quant, adapter) in GGUF.items():
        root = tmp_path_factory.mktemp("gguf")
        tree = make_tree(root, quant, data__seq_len=32)
        tree["adapter"] |= adapter
        llama = CONFIG.to_dict() | {"vocab_size": VOCABULARY}
        save_model(tf.LlamaConfig(**llama), root / "base")
        save_tokenizer(root / "base")
        assert train(World(), tree) == 0
        assert export(root / "run", root / "out", "gguf", "--no-verify") == 0
        found[name] = (root / "run", root / "out" / f"model-{kind}.gguf")
    return found


def list_trained_weights(run: Path) -> dict[str, torch.Tensor]:
    """Dequantized linears of the training's forward pass, and those with biases in fp16."""
    config = load_finished_run(run)
    with open_merged_weights(
        config.base, Path(config.base.path), run / "adapter", "trained"
    ) as walk:
        linears = {w.path: w for w in walk.weights if walk.is_packable(w)}
        return {
            path: walk.read_merged_rows(weight, Span(0, weight.num_rows))
            for path, weight in linears.items()
        }


@pytest.mark.e2e
@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_has_the_trained_codes(
    name: str, gguf_files: dict[str, tuple[Path, Path]]
) -> None:
    """The gguf package's own values of two linears that llama.cpp has in the same order: bit for
    bit those of the training's forward pass where groups are symmetric. In Q4_1 a bias is ``-scale
    * zero`` in fp16, so that others are off by up to half a unit of it."""
    import gguf

    run, file = gguf_files[name]
    wanted = list_trained_weights(run)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for own, layer in (("blk.0.ffn_down", "mlp.down_proj"), ("blk.1.attn_v", "self_attn.v_proj")):
        tensor, rows = stored[f"{own}.weight"], wanted[f"model.layers.{own[4]}.{layer}.weight"]
        assert tensor.tensor_type.name == GGUF[name][0].upper()
        dense = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if "symmetric" in name:
            assert torch.equal(dense, rows)
            continue
        fields = torch.from_numpy(tensor.data.copy()).view(len(rows), -1, 20)
        bias = fields[:, :, 2:4].contiguous().view(torch.float16).float()
        bound = (bias.abs() * 2**-11).clamp(min=2.0**-25).expand(-1, -1, 32).flatten(1)
        assert ((dense - rows).abs() <= bound * 1.001 + 1e-7).all()
        assert not torch.equal(dense, rows)


@pytest.mark.e2e
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", GGUF)
def test_llama_cpp_computes_the_trained_logits(
    name: str, gguf_files: dict[str, tuple[Path, Path]]
) -> None:
    """Its products round inputs to 8 bits, which the bound leaves room for."""
    if LLAMA_CPP_SERVER.find_python() is None:
        pytest.skip("xllamacpp is not installed, here or in DIST_PEFT_XLLAMACPP_PYTHON")
    run, file = gguf_files[name]
    probe = Probe.load_probe(run / "probe.safetensors")
    letter = load_tokenizer(run.parent / "base").encode("a", add_special_tokens=False)[-1]
    consumer, found = compare_by_llama_cpp(ConsumerRequest(file, probe, torch.float32), letter)
    assert consumer.startswith("llama.cpp (xllamacpp")
    assert found.changed and found.relative < 0.01, found


@pytest.mark.e2e
def test_a_merge_of_the_run_and_of_its_checkpoint_is_exact(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    """Also where the command says to merge into the original base: that model was not trained."""
    argv = ["merge", "--run", str(finished["int4"]), "--dtype", "float32", "--max-error", "1e-6"]
    assert main([*argv, "--out", str(tmp_path / "a"), "--base", "original"]) == 0
    assert main([*argv, "--out", str(tmp_path / "b"), "--checkpoint", "last"]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.e2e
def test_the_adapter_alone_is_refused_and_stamped(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished["nf4"]
    for name, options in (("peft", ()), ("bnb-nf4", ("--keep-adapter",))):
        assert export(run, tmp_path / "out", name, *options) == 2
        assert "base and adapter apart are another model" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "gptq") == 2  # NF4 codes
    assert "choose bnb-nf4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for name in ("compressed-tensors", "gptq"):
        assert export(finished["zeros"], tmp_path / "out", name) == 2
        assert "adapter.through_zeros" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["through_quantizer"] is True
    adapters = [str(finished[name] / "adapter") for name in ("int4", "nf4")]
    assert main(["combine", *adapters, "--out", str(tmp_path / "out")]) == 2
    assert "was trained through the quantizer" in capsys.readouterr().err
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("through_quantizer: true", ""))
    assert export(run, tmp_path / "out", "hf-bf16") == 2
    assert "restore adapter.through_quantizer" in capsys.readouterr().err
    (run / "config.yaml").write_text(text)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_floats_of_a_packed_base_are_trained_and_written_in_their_own_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears in NVFP4, which the library decompresses to bfloat16, and gpt-oss' experts, by whole
    commands; every format: ``tests/export/formats/test_same_format.py``."""
    tree = make_tree(tmp_path, INT3)
    if name == "nvfp4":
        base = save_compressed_fp4(packed.save_plain(tmp_path / "plain"), tmp_path / "packed")
    else:
        base = save_mxfp4(save_tokenized(GPT_OSS, tmp_path / "plain"), tmp_path / "packed")
        tree["adapter"]["target_modules"] = ["gate_up_proj", "down_proj"]
    tree["base"] = {"path": str(base), "compute_dtype": "float32"}
    tree["adapter"]["through_start_share"] = 0.25
    assert train(World(), tree) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    fork_consumers(monkeypatch)
    bound = "0.02" if name == "nvfp4" else "1e-5"
    assert export(tmp_path / "run", tmp_path / "out", name, "--max-error", bound) == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == packed.read_config(base)["quantization_config"]["quant_method"]


@pytest.mark.e2e
@pytest.mark.parametrize("name", PACKED)
def test_codes_of_a_packed_base_are_trained_and_written_in_its_own_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of plain LoRA, the codes from then on. The export's rows are the trained ones, its
    scales and zeros the base's; compressed-tensors gives the training's logits."""
    tree = make_tree(tmp_path, INT3)
    plain = packed.save_plain(tmp_path / "plain")
    base = PACKED[name](plain, tmp_path / "packed")
    tree["base"] = {"path": str(base), "compute_dtype": "float32"}
    tree["adapter"]["through_start_share"] = 0.25
    assert train(World(), tree) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    fork_consumers(monkeypatch)
    assert export(tmp_path / "run", tmp_path / "out", name, "--max-error", "0") == 0
    before, after = (linears(load(path)) for path in (base, tmp_path / "out"))
    own = open_adapter_merger(tmp_path / "run" / "adapter")
    moved = 0
    for weight, linear in after.items():
        span = Span(0, linear.out_features)
        read = WeightRows(before[weight], before[weight].packed)
        wanted = read.to_packed(partial(own.compute_encoded_rows, weight, span=span))
        assert torch.equal(linear.packed, wanted)
        one, two = (
            m.codec.split_packed_rows(m.packed, m.in_features) for m in (linear, before[weight])
        )
        assert torch.equal(one.scale, two.scale) and torch.equal(one.zero, two.zero)
        moved += int((one.codes != two.codes).sum())
    assert moved > 1000
    probe = Probe.load_probe(tmp_path / "run" / "probe.safetensors")
    logits = load(tmp_path / "out").model(input_ids=probe.input_ids, use_cache=False).logits
    assert torch.equal(logits, probe.trained)
