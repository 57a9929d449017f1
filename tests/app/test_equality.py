"""On real weights: neither losses nor adapter gradients depend on engine or number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from dist_peft.app.build import Built, load, prepare
from dist_peft.app.rows import Loaders, make_loaders
from dist_peft.core.config import RunConfig
from dist_peft.core.config_io import parse_config
from dist_peft.core.world import World
from dist_peft.engine.base import trainable
from dist_peft.train.loop import StepResult, batch_loss, fit
from dist_peft.train.optim import make_optimizer_factory
from tests.dist import run_ranks

CPU = torch.device("cpu")


def run_config(shared_data: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A short fp32 run of stories260K on TinyStories; ``section__key=value`` changes it."""
    tree: dict[str, Any] = {
        "base": {"path": str(shared_data / "stories260K-hf"), "compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": [
                {
                    "path": str(shared_data / "tinystories-1000" / "tinystories_clean.jsonl"),
                    "limit": 60,
                }
            ],
            "seq_len": 128,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"micro_batch": 1, "global_batch": 4, "lr": 5e-3, "steps": 20, "device": "cpu"},
        "save": {"dir": str(tmp_path / "run")},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree[section], name: value} if name else value
    return tree


def build(world: World, tree: dict[str, Any]) -> tuple[RunConfig, Built, Loaders]:
    config = parse_config(tree)
    prepared = prepare(config, world)
    loaders = make_loaders(config, prepared.tokenizer, world)
    built = load(prepared, config, world, CPU)
    factory = make_optimizer_factory(config.train, CPU)
    built.engine.optimize(built.model, factory, built.adapter.lr_scale)
    return config, built, loaders


def losses_and_gradients(
    world: World, tree: dict[str, Any]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps, and the adapter gradients of one more."""
    config, built, loaders = build(world, tree)
    results: list[StepResult] = []

    def note(result: StepResult) -> bool:
        results.append(result)
        return False

    steps = config.train.steps or 0
    fit(
        built.model,
        built.engine,
        built.adapter,
        loaders.train,
        world,
        first_step=0,
        last_step=steps,
        lr_at=lambda step: config.train.lr,
        max_grad_norm=config.train.max_grad_norm,
        after_step=note,
    )
    batches, targets = loaders.train.step(steps)
    for number, batch in enumerate(batches):
        built.adapter.begin(steps, batch.sample_ids)
        loss = batch_loss(built.model, batch, CPU) / targets
        built.engine.backward(loss, last=number == len(batches) - 1)
    gradients = {}
    for name, parameter in trainable(built.model).items():
        grad = parameter.grad
        assert grad is not None, name
        gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return [r.loss for r in results], gradients


NF4 = {"kind": "nf4"}
CASES = {
    "nf4": {"base__quant": NF4},
    "nf4 accumulating, no recomputation": {
        "base__quant": NF4,
        "train__global_batch": 6,
        "engine__activation_checkpointing": False,
    },
    "int3": {"base__quant": {"kind": "int", "bits": 3, "group_size": 32}},
    "unquantized": {"base__quant": None},
    "dora": {"base__quant": NF4, "adapter__use_dora": True},
    "embedding": {"base__quant": NF4, "adapter__embeddings": True},
    "unsharded base": {"base__quant": NF4, "engine__shard_base": False},
    "unpacked": {"base__quant": NF4, "data__packing": False, "data__too_long": "truncate"},
    "pissa": {"base__quant": NF4, "adapter__init": "pissa"},
}


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_fsdp2_equals_single(shared_data: Path, tmp_path: Path, case: str) -> None:
    tree = run_config(shared_data, tmp_path, **{"engine": {}, **CASES[case]})
    expected, expected_gradients = run_ranks(losses_and_gradients, 1, tree)[0]
    assert expected[-1] < expected[0]
    for ranks in (2, 3):
        for losses, gradients in run_ranks(losses_and_gradients, ranks, tree):
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0
            )
            for name, gradient in gradients.items():
                scale = expected_gradients[name].abs().max().item()
                torch.testing.assert_close(
                    gradient,
                    expected_gradients[name],
                    rtol=0,
                    atol=2e-4 * scale,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
