"""Full and partial fine-tuning: every engine, a plain training loop, stages, resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.equality import Outcome, all_cases, assert_same, build, train_steps
from tests.support.story_runs import NF4, losses, train
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_records, save_words, tiny_tree
from tests.support.training_steps import StepResult

pytestmark = pytest.mark.dist

CASES: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"kind": "full"}, "base__quant": None},
    "norms and ends": {
        "adapter": {"kind": "partial", "parts": ["norms", "embeddings", "head"]},
        "base__quant": NF4,
    },
    "biases and tied head": {
        "adapter": {"kind": "partial", "parts": ["biases", "head"]},
        "base__quant": NF4,
    },
    "last block": {"adapter": {"kind": "partial", "last_blocks": 1}, "base__quant": NF4},
    "stages": {
        "adapter": {
            "kind": "partial",
            "parts": ["head"],
            "unfreeze": [{"step": 1, "last_blocks": 1}, {"step": 2, "parts": ["all"]}],
        },
        "engine__activation_checkpointing": False,
    },
}
RUNS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "fsdp2, 2 ranks": (2, {"kind": "fsdp2"}, ("full", "norms and ends", "biases and tied head")),
    "fsdp2, 3 ranks": (3, {"kind": "fsdp2"}, ("last block", "stages")),
    "zero 2": (2, {"kind": "zero", "stage": 2}, ("norms and ends", "stages")),
    "zero 3": (3, {"kind": "zero", "stage": 3}, ("biases and tied head", "stages")),
}
"""Ranks, engine, cases; at the end of ``stages`` everything learns."""

LATE: dict[str, Any] = {
    "kind": "partial",
    "parts": ["norms"],
    "unfreeze": [{"step": 100, "last_blocks": 1}],
}


def tree(directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    short = {
        "train__steps": 3,
        "train__global_batch": 4,
        "train__weight_decay": 0.1,
        "train__lr": 3e-3,
        "data__train": [str(save_records(directory / "twelve.jsonl", 12))],
        "data__packing": True,
        "data__seq_len": 32,
        "engine": {},
    }
    made = tiny_tree(directory, **{**short, **CASES.get(case, {}), **changes})
    if "tied" in case:
        save_model(CONFIGS["llama-tied-bias"], directory / "base")
        save_words(directory / "base")
    return made


def run_steps(world: World, tree: dict[str, Any]) -> tuple[Any, list[StepResult]]:
    """Train as ``train`` does, at a constant rate; gives what was built and the steps."""
    config, built, loaders, call = build(world, tree)
    steps = range(config.train.steps or 0)
    return (built, loaders), train_steps(world, config, built, loaders, call, steps)


Waiting = dict[str, dict[str, Tensor]]
"""What is kept -> parameter -> value, of the parameters whose stage did not come."""


def waiting(world: World, tree: dict[str, Any]) -> Waiting:
    """Parameters that waited, and their moments, after training under weight decay."""
    (built, _), _ = run_steps(world, tree)
    found: Waiting = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for key, value in built.engine.training_state_dict(built.model).items():
        kind, _, name = key.partition("/")
        if not built.setup.adapter.get_trainable_steps(name).includes(0):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[kind][name] = whole.clone()
    return found


TURNS: dict[str, Any] = {
    "kind": "partial",
    "parts": ["head"],
    "unfreeze": [
        {"step": 0, "until": 1, "parts": ["embeddings"]},
        {"step": 2, "until": 4, "parts": ["norms"]},
    ],
    "sample_blocks": {"count": 1, "every": 2},
}
"""What is trained in some steps is frozen in later ones, with layer decay."""


def train_in_turns(world: World, tree: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters and moments after five steps."""
    (built, _), _ = run_steps(world, tree)
    state = built.engine.training_state_dict(built.model)
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for key, value in state.items()
    }


def everything(
    world: World, trees: dict[str, dict[str, Any]], late: dict[str, Any], turns: dict[str, Any]
) -> tuple[dict[str, Outcome], Waiting, dict[str, Tensor]]:
    """All of a run's cases in one set of processes."""
    return all_cases(world, trees), waiting(world, late), train_in_turns(world, turns)


Outcomes = dict[str, list[tuple[dict[str, Outcome], Waiting, dict[str, Tensor]]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def outcomes(directory: Path) -> Outcomes:
    """Run -> what each rank got; "single" is the reference."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    singles = {case: tree(directory / case, case) for case in CASES}
    late = tree(directory / "late", "late", adapter=LATE)
    steps = {"train__steps": 5, "train__layer_decay": 0.5}
    turns = tree(directory / "turns", "turns", adapter=TURNS, **steps)
    found = {"single": [everything(World(), singles, late, turns)]}
    for run, (ranks, engine, cases) in RUNS.items():
        trees = {
            case: {**singles[case], "engine": {**singles[case]["engine"], **engine}}
            for case in cases
        }
        others = [{**made, "engine": engine} for made in (late, turns)]
        found[run] = run_ranks(everything, ranks, trees, *others, timeout=400)
    return found


@pytest.mark.parametrize(
    ("run", "case"), [(run, case) for run, (_, _, cases) in RUNS.items() for case in cases]
)
def test_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    """fp32 losses within 1e-6 of one process's, gradients likewise."""
    expected = outcomes["single"][0][0][case]
    for outcome, _, _ in outcomes[run]:
        assert_same(outcome[case], expected)
    print(f"{case}, {run}: loss {expected[0][0]:.4f} -> {expected[0][-1]:.4f}")


@pytest.mark.parametrize("run", ["single", *RUNS])
def test_what_waits_is_untouched(outcomes: Outcomes, run: str, directory: Path) -> None:
    """Bit for bit the base's, although all else decays; Adam has seen nothing."""
    base = tf.AutoModelForCausalLM.from_pretrained(directory / "late" / "base").state_dict()
    for _, found, _ in outcomes[run]:
        assert len(found["param"]) == 7  # the last block's linears; its norms learn
        for name, value in found["param"].items():
            assert torch.equal(value, base[name]), name
            assert not found["exp_avg"][name].any() and not found["exp_avg_sq"][name].any()


@pytest.mark.parametrize("run", RUNS)
def test_what_is_frozen_again_keeps_its_moments(outcomes: Outcomes, run: str) -> None:
    """Parameters and moments, of which DeepSpeed would change those without a gradient."""
    expected = outcomes["single"][0][2]
    for _, _, found in outcomes[run]:
        assert found.keys() == expected.keys()
        for name, value in found.items():
            error = (value - expected[name]).norm() / expected[name].norm()
            assert error < 2e-4, (name, error)


# -- against a loop without this project -----------------------------------------------------------


def plain_loop(
    directory: Path,
    tree: dict[str, Any],
    loader: Any,
    trains: Callable[[str, int], bool] = lambda name, step: True,
) -> tuple[list[float], dict[str, Tensor]]:
    """transformers' model and torch's AdamW on the same rows: losses, weights.

    ``trains``: whether a parameter has a gradient in a step.
    """
    model = tf.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    settings = tree["train"]
    decay = settings.get("layer_decay", 1.0)
    depths = {"embed_tokens": 0, "layers.0.": 1, "layers.1.": 2}
    groups = []
    for name, parameter in model.named_parameters():
        depth = next((depth for part, depth in depths.items() if part in name), 3)
        groups.append({"params": [parameter], "lr": settings["lr"] * decay ** (3 - depth)})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings["weight_decay"])
    losses = []
    for step in range(settings["steps"]):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains(name, step))
        batches, targets = loader.load_step(step)
        total = 0.0
        for batch in batches:
            # rows are not packed, and nothing sees the padding after it
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
            labels = batch.labels.flatten()
            loss = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            total += loss.item()
            (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / targets)
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("decay", [1.0, 0.4])
def test_full_equals_a_plain_loop(decay: float, tmp_path: Path) -> None:
    """Discriminative rates, too."""
    changes = {"data__packing": False, "data__seq_len": 16, "train__layer_decay": decay}
    made = tree(tmp_path, "full", train__steps=5, **changes)
    (built, loaders), results = run_steps(World(), made)
    expected, weights = plain_loop(tmp_path, made, loaders.train)
    found = [result.loss for result in results]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    worst = 0.0
    for name in built.setup.adapter.list_source_tensors():
        mine = built.get_parameter(name).detach()
        torch.testing.assert_close(mine, weights[name].detach(), rtol=1e-4, atol=1e-5, msg=name)
        worst = max(worst, (mine - weights[name]).abs().max().item())
    print(f"losses {expected[0]:.4f} -> {expected[-1]:.4f}; largest difference {worst:.1e}")


def test_stages_and_sampled_blocks_equal_a_plain_loop(tmp_path: Path) -> None:
    """``unfreeze`` with ``until``, LISA and discriminative rates together, over five steps."""
    changes = {"data__packing": False, "data__seq_len": 16, "train__layer_decay": 0.5}
    made = tree(tmp_path, "turns", adapter=TURNS, train__steps=5, **changes)
    (built, loaders), results = run_steps(World(), made)
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1)]
    drawn = [built.setup.adapter.get_trainable_steps(name) for name in names]
    turns = [[steps.includes(step) for step in range(5)] for steps in drawn]
    assert all(sum(pair) == 1 for pair in zip(*turns, strict=True)), "one of two blocks at a time"

    def trains(name: str, step: int) -> bool:
        if "lm_head" in name:
            return True
        if "embed_tokens" in name:
            return step < 1
        in_turn = any(f"layers.{number}." in name and turns[number][step] for number in (0, 1))
        return in_turn or ("norm" in name and 2 <= step < 4)

    expected, weights = plain_loop(tmp_path, made, loaders.train, trains)
    found = [result.loss for result in results]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    sources = built.setup.adapter.list_source_tensors()
    assert set(sources.values()) == set(weights)
    for name, source in sources.items():
        mine = built.get_parameter(name).detach()
        torch.testing.assert_close(mine, weights[source].detach(), rtol=1e-4, atol=1e-5, msg=name)


# -- resuming --------------------------------------------------------------------------------------


def test_resumed_between_stages(tmp_path: Path) -> None:
    """Stopped after step 2, before the last stage: goes on in one process exactly, and from one
    engine to the other as closely as these agree."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")

    def named(name: str, **engine: Any) -> dict[str, Any]:
        save = {"dir": str(tmp_path / name), "every": 0}
        return tree(tmp_path, "stages", save=save, train__steps=4, engine=engine)

    assert train(World(), named("whole")) == 0
    assert train(World(), named("single"), 2) == 75
    assert train(World(), named("single")) == 0
    assert run_ranks(train, 2, named("moved", kind="fsdp2"), 2) == [75, 75]
    assert run_ranks(train, 2, named("moved", kind="zero", stage=2)) == [0, 0]
    close_log()
    whole, single, moved = (
        torch.tensor(losses(tmp_path / name)) for name in ("whole", "single", "moved")
    )
    assert torch.equal(single, whole) and whole[-1] < whole[0]
    torch.testing.assert_close(moved, whole, rtol=1e-6, atol=0)
