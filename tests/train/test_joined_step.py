"""Gradients of several adapters by one pass are those of each by its own."""

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.joined_step import AdapterWork, JoinedStep
from dist_peft.train.objective import TokenObjective
from tests.support.equality import build, make_step
from tests.support.sweep_runs import sweep_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    config = parse_config(sweep_tree(tmp_path_factory.mktemp("sweep")))
    resolved = resolve_config(config)
    return load_weights(build_model(resolved), World(), CPU), resolved


def load_works(whole: LoadedModel, resolved: Any) -> dict[int, AdapterWork]:
    """Each point at another step; the second one without its last micro-batches."""
    works = {}
    for number, point in enumerate(resolved.split_points().values()):
        loaders = make_data_loaders(point.run, whole.setup.tokenizer, World())
        batches, targets = loaders.train.load_step(number)
        works[number] = AdapterWork(number, batches, targets)
    second = works[1]
    return {**works, 1: second._replace(batches=second.batches[:1])}


def compute(whole: LoadedModel, works: Mapping[int, AdapterWork]) -> tuple[Any, dict[str, Tensor]]:
    adapter = cast(JoinedAdapter, whole.setup.adapter)
    step = JoinedStep(
        whole.model, whole.engine, TokenObjective(), World(), adapter.adapters, adapter.shares
    )
    losses = step.accumulate_gradients(works)
    grads = {n: p.grad for n, p in whole.model.named_parameters() if p.grad is not None}
    whole.model.zero_grad(set_to_none=True)
    return losses, cast(dict[str, Tensor], grads)


def test_gradients_of_each_point(sweep: tuple[LoadedModel, Any]) -> None:
    for at_head in (True, False):
        with mock.patch("dist_peft.train.objective.computes_losses_at_head", return_value=at_head):
            check_gradients(*sweep)


RANKS: list[dict[str, Any]] = [{"seed": 1, "r": 2}, {"target_modules": ["q_proj"]}, {}]
RATES: list[dict[str, Any]] = [{"lr": 1e-3}, {"target_modules": ["q_proj"]}, {"seed": 3}]
METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    **{
        kind: ({"kind": kind, "r": 3, "dropout": 0.2}, RANKS)
        for kind in ("qalora", "vera", "loha", "lokr")
    },
    "dora": ({"r": 3, "use_dora": True, "dropout": 0.2}, [*RANKS, {"dropout": 0.0}]),
    "embeddings": ({"r": 3, "embeddings": True}, RANKS),
    "adalora": ({"kind": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}, RATES),
    "ia3": ({"kind": "ia3", "target_modules": ["q_proj", "down_proj"]}, RATES),
}
"""Adapter and points."""


@pytest.mark.parametrize("kind", [*METHODS, "pissa", "loftq"])
def test_gradients_of_other_methods(kind: str, tmp_path: Path) -> None:
    """PiSSA and LoftQ change the base, and points that share it have one start."""
    shared = [{"lr": 1e-3}, {"dropout": 0.2}, {"data": str(tmp_path / "eval.jsonl")}]
    residual = ({"r": 3, "init": kind, "init_iterations": 2}, shared)
    adapter, points = METHODS.get(kind, residual)
    tree = sweep_tree(tmp_path, adapter=adapter, sweep={"points": points})
    resolved = resolve_config(parse_config(tree))
    check_gradients(load_weights(build_model(resolved), World(), CPU), resolved)


def check_gradients(whole: LoadedModel, resolved: Any) -> None:
    """Those of each point are the gradients of its run alone, from the same start."""
    works = load_works(whole, resolved)
    losses, grads = compute(whole, works)
    for number, point in enumerate(resolved.split_points().values()):
        tree = point.run.model_dump(mode="json")
        config, built, loaders, call = build(World(), tree)
        work = works[number]
        with closing(make_step(World(), config, built, loaders, call)) as part:
            loss = part.accumulate_gradients(work.step, work.batches, work.targets)
        assert losses[number].mean == pytest.approx(loss, rel=1e-6)
        assert len(losses[number].losses) == len(work.batches)
        prefix = f".points.{number}."
        found = {n.replace(prefix, "."): g for n, g in grads.items() if prefix in n}
        for name, parameter in built.model.named_parameters():
            owner, _, own = name.rpartition(".")
            if own == "packed":
                module = whole.model.get_submodule(owner)
                assert torch.equal(getattr(module, "base", module).packed, parameter), name
            if parameter.requires_grad:
                assert parameter.grad is not None
                error = (found[name] - parameter.grad).norm()
                assert error <= 2e-4 * parameter.grad.norm() + 1e-9, name


def test_loss_that_is_not_finite_is_its_own_points(sweep: tuple[LoadedModel, Any]) -> None:
    whole, resolved = sweep
    works = load_works(whole, resolved)
    plain = TokenObjective.compute_share_losses

    def broken(*args: Any) -> list[Tensor]:
        losses = plain(*args)
        return [losses[0] * math.inf, *losses[1:]]

    with mock.patch.object(TokenObjective, "compute_share_losses", broken):
        losses, grads = compute(whole, works)
    assert not math.isfinite(losses[0].mean) and math.isfinite(losses[1].mean)
    for name, grad in grads.items():
        assert bool(grad.isfinite().all()) == (".points.0." not in name), name
