"""Losses and adapter gradients of a run, to compare engines and numbers of ranks."""

from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_peft.app.data_setup import DataLoaders, make_data_loaders
from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.app.step_setup import make_training_step
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.train.loop import TrainingStep
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.training_steps import StepResult, run_training_steps

CPU = torch.device("cpu")


def build(
    world: World, tree: dict[str, Any]
) -> tuple[RunConfig, LoadedModel, DataLoaders, nn.Module]:
    config = parse_config(tree)
    prepared = build_model(resolve_config(config))
    loaders = make_data_loaders(config, prepared.tokenizer, world)
    built = load_weights(prepared, world, CPU)
    factory = make_optimizer_factory(config.train, CPU)
    call = built.setup_optimizer(factory)
    return config, built, loaders, call


def train_steps(
    world: World,
    config: RunConfig,
    built: LoadedModel,
    loaders: DataLoaders,
    call: nn.Module,
    steps: range,
) -> list[StepResult]:
    """Train as ``train`` does, at a constant rate."""
    c = config.train
    with closing(make_step(world, config, built, loaders, call)) as part:
        return run_training_steps(part, loaders.train, steps, lambda step: c.lr, c.max_grad_norm)


def make_step(
    world: World, config: RunConfig, built: LoadedModel, loaders: DataLoaders, call: nn.Module
) -> TrainingStep:
    return make_training_step(config.train, built, call, loaders.objective, world)


def losses_and_gradients(
    world: World, tree: dict[str, Any]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps, and the adapter gradients of one more."""
    config, built, loaders, call = build(world, tree)
    steps = config.train.steps or 0
    results = train_steps(world, config, built, loaders, call, range(steps))
    batches, targets = loaders.train.load_step(steps)
    with closing(make_step(world, config, built, loaders, call)) as part:
        part.accumulate_gradients(steps, batches, targets)
    parameters = trainable_parameters(built.model)
    return [r.loss for r in results], {n: whole_gradient(p) for n, p in parameters.items()}


def whole_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """After ``backward``, before ``step``; a collective."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        grad = safe_get_full_grad(parameter)
    else:
        grad = parameter.grad
    assert grad is not None
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()


Outcome = tuple[list[float], dict[str, torch.Tensor]]


def all_cases(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, Outcome]:
    """Every case in one set of processes: starting them takes longer than most cases."""
    return {case: losses_and_gradients(world, tree) for case, tree in trees.items()}


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """Losses within 1e-6, gradients within 2e-4, relative to ``expected``."""
    assert min(expected[0]) < expected[0][0]
    losses = max(abs(a / b - 1) for a, b in zip(outcome[0], expected[0], strict=True))
    errors = {
        name: ((outcome[1][name] - want).norm() / want.norm().clamp_min(1e-12)).item()
        for name, want in expected[1].items()
    }
    print(f"largest difference: losses {losses:.1e}, gradients {max(errors.values()):.1e}")
    torch.testing.assert_close(
        torch.tensor(outcome[0]), torch.tensor(expected[0]), rtol=1e-6, atol=0
    )
    assert outcome[1].keys() == expected[1].keys()
    for name, error in errors.items():
        assert error < 2e-4, f"{name}: relative error {error:.1e}"
