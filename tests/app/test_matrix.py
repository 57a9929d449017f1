"""Every method on every kind of base with every engine, on a really pretrained model.

A cell is a method, a base and an engine. Its run begins on that engine, is cut short, and goes on
from its checkpoint on the next engine::

    single -> fsdp2 (2 ranks)
    fsdp2 -> zero (2 ranks; bf16: stage 1, INT4: 2, NF4: 3)
    zero -> single

Cells take turns (``tests/support/turns.py``): each turn has every base with every engine, and half
of the pairs of a method and a base, each on one engine. Two turns have every pair, six every cell.

Adapters have odd sizes, so that two ranks hold different numbers of rows.

The losses must be those of one process that was never cut, they must fall, and what the run leaves
must be the same adapter, loaded by whoever reads its format: PEFT for the methods in its files
(QA-LoRA expanded), ``transformers`` for merged weights of the base. Bottleneck adapters and
AdapterFusion have AdapterHub's library for that (``test_bottleneck.py``, ``test_fusion.py``), which
wants another environment; here a fresh run starts from their files instead.

Methods that share their layers' code with LoRA, and its initializations, are in the cells of one
base each. On the others they train in one process, PEFT reads the result, and one is merged, the
other exported to a quantized format.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.qalora.format import expand_to_plain_lora
from dist_peft.app import cli
from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.quant.codec import make_codec
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.story_runs import losses, run_config, train
from tests.support.turns import list_selected, number_turn

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = [pytest.mark.dist, pytest.mark.data]

STEPS, CUT = 3, 1
PEFT = (
    *("lora", "qalora", "adalora", "vera", "loha", "lokr", "ia3", "prompt", "ptuning", "prefix"),
    *("eva", "lora_ga"),
)
BASES: dict[str, dict[str, Any]] = {
    # one row at a time: a gradient of two rows is rounded to bfloat16 once, that of each row twice
    "bf16": {
        "base__quant": None,
        "base__compute_dtype": "bfloat16",
        "train__micro_batch": 1,
    },
    "nf4": {"base__quant": {"kind": "nf4"}},
    "int4": {"base__quant": {"kind": "int", "bits": 4, "group_size": 32}},
}
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "lora": (3e-3, {"r": 3, "alpha": 6, "dropout": 0.1}),
    # not down_proj: its 172 inputs are no whole number of groups
    "qalora": (3e-3, {"r": 3, "alpha": 6, "target_modules": [r".*self_attn\..*", "gate_proj"]}),
    "vera": (1e-1, {"r": 27, "dropout": 0.1}),
    "loha": (1e-2, {"r": 3, "alpha": 12, "dropout": 0.1}),
    "lokr": (1e-2, {"r": 3, "alpha": 12, "dropout": 0.1}),
    # one triplet in five goes before the cut, the last ones after it
    "adalora": (3e-2, {"init_r": 5, "target_r": 3, "tfinal": 1, "dropout": 0.1}),
    "ia3": (3e-2, {}),
    "bottleneck": (3e-3, {"reduction_factor": 9, "dropout": 0.1}),
    "fusion": (1e-2, {}),
    "prefix": (3e-3, {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "ptuning": (1e-3, {"num_virtual_tokens": 3}),
    "prompt": (1.5e-2, {"num_virtual_tokens": 5}),
    "full": (1e-3, {}),
    "partial": (1e-3, {"parts": ["norms"], "last_blocks": 1}),
    "eva": (3e-3, {"kind": "lora", "init": "eva", "init_rho": 1.5, "r": 3, "alpha": 6}),
    "lora_ga": (1e-3, {"kind": "lora", "init": "lora_ga", "r": 3, "alpha": 6, "dropout": 0.1}),
    # on a pruned base
    "keep_zeros": (3e-3, {"kind": "lora", "keep_zeros": True, "r": 3, "alpha": 6}),
}
"""Method -> learning rate, adapter section."""

ONE_BASE = {
    **{"eva": "nf4", "lora_ga": "int4", "keep_zeros": "nf4"},
    **{"adalora": "nf4", "vera": "bf16", "loha": "nf4", "lokr": "int4"},
}
"""Initializations of LoRA, which differ from it in the first step and in what is written, and
layers that share their code with LoRA's are tried with every engine on one kind of base each."""

OTHER_BASES = [
    (method, base, export)
    for method, known in ONE_BASE.items()
    if method in PEFT
    for base, export in zip(sorted(BASES.keys() - {known}), ("merge", "int8"), strict=True)
]
"""The other kinds of base, with one process: method, base, and an export of the run.
``keep_zeros`` has them in ``test_pruning.py``."""

INT8 = ["export", "--format", "compressed-tensors", "--merge", "--lossy", "--bits", "8"]
"""Weights are rounded to 8 bits after the merge."""

REFUSED = {
    ("qalora", "bf16"): "qalora",
    ("qalora", "nf4"): "qalora",
}
"""What has no meaning: QA-LoRA needs an integer base."""

BF16_NOISE = {"ptuning": 0.5}
"""Share of the change by training that rounding alone can move the logits by, where that is more
than 20 %: gradients perturbed by 1e-6 of their largest element move P-tuning's by 16 to 25 %, at
any learning rate, since one flipped bit of a virtual token reaches every logit."""

SAMPLED = ("prompt", "nf4")
"""The cell with scheduled sampling: on every engine the same half of the inputs is predicted."""

NEXT = {"single": "fsdp2", "fsdp2": "zero", "zero": "single"}
CELLS = [
    (method, base)
    for method in METHODS
    for base in BASES
    if (method, base) not in REFUSED and base == ONE_BASE.get(method, base)
]

Cell = tuple[str, str, str]
"""Method, base, and the engine that its run begins on."""


def place(number: int, method: str, base: str, engine: str) -> Any:
    """A cell: of each three turns one has its engine, and of each two one has its pair."""
    third = number_turn((method, [*METHODS]), (base, [*BASES]), (engine, [*NEXT]), of=3).args[0]
    turn = next(t for t in range(6) if t % 3 == third and t % 2 == number % 2)
    return pytest.param(method, base, engine, marks=pytest.mark.turn(turn, 6))


PLACES = [
    place(number, method, base, engine)
    for number, (method, base) in enumerate(CELLS)
    for engine in NEXT
]

Job = tuple[dict[str, Any], int | None]
"""A configuration, and the step at which a signal comes."""


def tree(data: Path, directory: Path, method: str, base: str, run: str) -> dict[str, Any]:
    """Four short documents, all of them in each step."""
    lr, section = METHODS[method]
    if method == "fusion":
        section = {"adapters": [str(directory / f"stage1-{i}" / "adapter") for i in (0, 1)]}
    made = run_config(
        data,
        directory,
        **{
            "train__micro_batch": 2,
            **BASES[base],
            "adapter": {"kind": method, **section},
            "data__packing": False,
            "data__seq_len": 64,
            "data__too_long": "truncate",
            "train__steps": STEPS,
            "train__lr": lr,
            "train__warmup": 0,
            "train__schedule": "constant",
            "train__scheduled_sampling": {"c": 0, "k": 0.5} if (method, base) == SAMPLED else None,
            "save": {"dir": str(directory / f"{method}-{base}-{run}"), "every": 0},
        },
    )
    stories = Path(made["data"]["train"][0]["path"])
    short = directory / "short.jsonl"
    with stories.open() as lines:
        texts = [json.loads(line)["text"][:100] for line, _ in zip(lines, range(4), strict=False)]
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if method == "keep_zeros":
        made["base"] = {**made["base"], "path": str(prune_half(data, directory))}
    sources = {"train": [str(short)], "eval": [{"path": str(short), "limit": 1}]}
    made["data"] = {**made["data"], **sources}
    return made


def prune_half(data: Path, directory: Path) -> Path:
    """The base without the smaller half of the weights of each linear of its blocks."""
    base, out = data / "stories260K-hf", directory / "sparse"
    if not out.exists():
        shutil.copytree(base, out)
        tensors = load_file(base / "model.safetensors")
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                weight[weight.abs() < weight.abs().median()] = 0
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def on(engine: str, tree: dict[str, Any]) -> dict[str, Any]:
    """With zero each base has a stage of its own; QA-LoRA, which has one base, has stage 3."""
    quant, pooled = tree["base"]["quant"], tree["adapter"]["kind"] == "qalora"
    stage = 1 if quant is None else 3 if pooled else {"int": 2, "nf4": 3}[quant["kind"]]
    return {**tree, "engine": {"kind": engine, **({"stage": stage} if engine == "zero" else {})}}


def work(world: World, jobs: list[Job]) -> list[int]:
    """Exit codes of runs, one after another: starting processes takes longer than a run."""
    return [train(world, tree, stop) for tree, stop in jobs]


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest) -> list[Cell]:
    """The cells that this session runs."""
    found = list_selected(request.session, test_cell)
    return [(values["method"], values["base"], values["engine"]) for values in found]


@pytest.fixture(scope="module")
def runs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory, cells: list[Cell]) -> Path:
    """The directory of their runs: METHOD-BASE-ENGINE, begun on that engine, and -whole."""
    directory = tmp_path_factory.mktemp("matrix")
    for number in (0, 1):
        stage1 = tree(shared_data, directory, "bottleneck", "nf4", "single")
        stage1["train"] = {**stage1["train"], "seed": number}
        stage1["save"] = {"dir": str(directory / f"stage1-{number}")}
        assert work(World(), [(stage1, None)]) == [0]

    def jobs(engine: str, begun: str, stop: int | None) -> list[Job]:
        pairs = [(method, base) for method, base, first in cells if first == begun]
        return [(on(engine, tree(shared_data, directory, *pair, begun)), stop) for pair in pairs]

    pairs = dict.fromkeys((method, base) for method, base, _ in cells)
    whole: list[Job] = [(tree(shared_data, directory, *pair, "whole"), None) for pair in pairs]
    cut = jobs("single", "single", CUT)
    assert work(World(), [*whole, *cut]) == [0] * len(whole) + [75] * len(cut)
    for engine, before in (("fsdp2", "single"), ("zero", "fsdp2")):
        resumed, begun = jobs(engine, before, None), jobs(engine, engine, CUT)
        # what zero 3 does to its process stays there: it comes last
        todo = sorted([*resumed, *begun], key=lambda job: job[0]["engine"].get("stage", 0))
        for codes in run_ranks(work, 2, todo, timeout=900):
            assert codes == [75 if stop else 0 for _, stop in todo]
    resumed = jobs("single", "zero", None)
    assert work(World(), resumed) == [0] * len(resumed)
    close_log()
    return directory


@pytest.mark.parametrize(("method", "base", "engine"), PLACES)
def test_cell(runs: Path, shared_data: Path, method: str, base: str, engine: str) -> None:
    run, whole = runs / f"{method}-{base}-{engine}", runs / f"{method}-{base}-whole"
    expected, found = losses(whole), losses(run)
    print(f"{method}, {base}, {engine} then {NEXT[engine]}: {found[0]:.5f} -> {found[-1]:.5f}")
    assert len(found) == STEPS and found[-1] < found[0] - 0.01
    # bfloat16 turns a difference in the last bit of a sum into one of 0.4 %
    rtol = 1e-2 if base == "bf16" else 2e-6
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0)
    same_probe(run, whole, BF16_NOISE.get(method, 0.2) if base == "bf16" else 5e-3)
    reload(run, shared_data, method, base)


def same_probe(run: Path, whole: Path, tolerance: float) -> None:
    """The trained models' logits, in relation to what training changed."""
    probe = Probe.load_probe(whole / "probe.safetensors")
    difference = compare_logits(Probe.load_probe(run / "probe.safetensors").trained, probe)
    assert difference.relative < tolerance, f"the adapters differ: {difference}"


@pytest.mark.parametrize(("method", "base", "export"), OTHER_BASES)
def test_other_bases(
    shared_data: Path, tmp_path: Path, method: str, base: str, export: str
) -> None:
    made = tree(shared_data, tmp_path, method, base, "alone")
    assert work(World(), [(made, None)]) == [0]
    run = Path(made["save"]["dir"])
    found = losses(run)
    assert found[-1] < found[0] - 0.01
    reload(run, shared_data, method, base)
    # both are compared with the trained model, by transformers
    if export == "merge":
        command = [
            "merge",
            "--dtype",
            "float32",
            "--max-error",
            "0.3" if base == "bf16" else "1e-4",
        ]
    else:
        command = [*INT8, "--max-error", "0.1"]
    into = "original" if base == "bf16" else "decoded"
    paths = ["--run", str(run), "--out", str(tmp_path / "out")]
    assert cli.main([*command, *paths, "--base", into]) == 0
    close_log()


# -- what is left is read by its consumer ----------------------------------------------------------


def reload(run: Path, data: Path, method: str, base: str) -> None:
    if method in ("bottleneck", "fusion"):
        return reload_here(run, 1e-2 if base == "bf16" else 1e-5)
    probe = Probe.load_probe(run / "probe.safetensors")
    if method in PEFT:
        model = with_peft(run, decoded_base(data, base), method)
    else:
        out = run / "merged"
        base_in = ["--base", "original" if base == "bf16" or method == "full" else "decoded"]
        merge = ["merge", "--run", str(run), "--out", str(out), *base_in, "--no-verify"]
        assert cli.main(merge) == 0
        close_log()
        model = tf.AutoModelForCausalLM.from_pretrained(out, dtype=probe_dtype(base))
    with torch.no_grad():
        logits = model.eval()(input_ids=probe.input_ids).logits[:, -probe.input_ids.shape[1] :]
    difference = compare_logits(logits.float(), probe)
    print(f"reloaded: {difference}")
    # merged weights are bfloat16 in their files
    noise = BF16_NOISE.get(method, 0.2)  # transformers may multiply natively in bfloat16
    assert difference.relative < (noise if base == "bf16" or method not in PEFT else 1e-3)
    return None


def probe_dtype(base: str) -> torch.dtype:
    return torch.bfloat16 if base == "bf16" else torch.float32


def decoded_base(data: Path, base: str) -> Any:
    """The base in plain ``transformers``, with the weights that the codec gives back."""
    path, dtype = data / "stories260K-hf", probe_dtype(base)
    model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    quant = BASES[base]["base__quant"]
    codec = make_codec(None if quant is None else QuantConfig(**quant), dtype)
    for block in find_decoder_blocks(model):
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            packed = codec.quantize_to_packed(linear.weight.detach().float())
            linear.weight.data = codec.dequantize_rows(packed, linear.in_features, dtype)
    return model


def with_peft(run: Path, model: Any, method: str) -> Any:
    directory = run / "adapter"
    if method == "qalora":
        public = expand_to_plain_lora(read_adapter_directory(directory))
        directory = run / "expanded"
        write_adapter_directory(directory, public, {})
    return PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)


def reload_here(run: Path, tolerance: float) -> None:
    """A new run that starts from the files has the old one's last held-out loss at its start."""
    assert read_adapter_directory(run / "adapter").config["model_class"] == "LlamaForCausalLM"
    tree = load_config(run / "config.yaml")
    section = tree.adapter.model_copy(update={"init_from": str(run / "adapter")})
    save = tree.save.model_copy(update={"dir": str(run / "again")})
    steps = tree.train.model_copy(update={"steps": 1})
    engine = tree.engine.model_copy(update={"kind": "single"})
    changes = {"adapter": section, "save": save, "train": steps, "engine": engine}
    again = tree.model_copy(update=changes).model_dump(mode="json")
    assert work(World(), [(again, None)]) == [0]
    expected = read_metrics(run / "metrics.jsonl")[-1].eval_loss
    before = read_metrics(run / "again" / "metrics.jsonl")[0].eval_loss_before
    assert before == pytest.approx(expected, rel=tolerance)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "base"), REFUSED)
def test_refused(shared_data: Path, tmp_path: Path, method: str, base: str) -> None:
    with pytest.raises(UserError, match=REFUSED[method, base]):
        train(World(), tree(shared_data, tmp_path, method, base, "refused"))
    assert not list(tmp_path.glob("*/adapter"))
