"""Points in lockstep have the bits of passes of their own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import ModelSetup, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.app.sweep.point_model import make_point_model
from dist_peft.app.sweep.point_step import list_gathered_units, make_joined_step
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.joined_step import AdapterWork
from dist_peft.train.lockstep_step import LockstepStep
from dist_peft.train.objective import TokenObjective
from tests.support.sweep_runs import sweep_tree

CPU = torch.device("cpu")


def take_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def load_points(directory: Path, **changes: Any) -> tuple[Any, list[Any], list[Any]]:
    """The model, a training of each point, and a step's work of each."""
    resolved = resolve_config(parse_config(sweep_tree(directory, **changes)))
    whole = load_weights(build_model(resolved), World(), CPU)
    adapter, trainings, works = cast(JoinedAdapter, whole.setup.adapter), [], []
    for number, point in enumerate(resolved.split_points().values()):
        own = {"config": point.run, "adapter": adapter.adapters[number]}
        setup = ModelSetup(**{**vars(whole.setup), **own})
        built = make_point_model(whole, setup, number, adapter.shares)
        loaders = make_data_loaders(point.run, setup.tokenizer, World())
        trainings.append(SimpleNamespace(built=built, call=built.model, loaders=loaders))
        works.append(AdapterWork(0, *loaders.train.load_step(0)))
    return whole, trainings, works


def test_bits_of_gradients_and_of_held_out_statistics(tmp_path: Path) -> None:
    whole, trainings, works = load_points(tmp_path, train__exact=True)
    units, objective = list_gathered_units(whole), TokenObjective()
    blocks = whole.setup.skeleton.blocks
    assert set(blocks) < set(units) and whole.model.get_output_embeddings() in units
    step = make_joined_step(whole, trainings, units, World())
    assert isinstance(step, LockstepStep) and step.micro_batches == 3
    numbered = dict(enumerate(works))
    assert step.can_join(numbered)
    assert not step.can_join({**numbered, 1: works[1]._replace(batches=works[1].batches[:1])})
    calls = [0]
    handle = blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    losses = step.accumulate_gradients(numbered)
    handle.remove()
    assert sum(calls) == len(works[0].batches)
    found = take_gradients(whole.model)
    for number, (training, work) in enumerate(zip(trainings, works, strict=True)):
        model = training.built.model
        with step.shares.give_all(number):
            for batch, loss in zip(work.batches, losses[number].losses, strict=True):
                step.adapters[number].begin_micro_batch(0, batch.sample_ids)
                own = objective.compute_loss(model, batch, CPU, model)
                assert torch.equal(own.detach(), loss)
                (own / work.targets).backward()
        for name, grad in take_gradients(whole.model).items():
            assert torch.equal(found.pop(name), grad), name
    assert not found
    batches = {k: work.batches[0] for k, work in numbered.items()}
    with torch.no_grad():
        for k, statistics in step.compute_statistics(batches).items():
            own_model = trainings[k].built.model
            wanted = objective.compute_row_statistics(own_model, batches[k], CPU)
            assert torch.equal(statistics, wanted)


def test_batches_are_joined_otherwise(tmp_path: Path) -> None:
    whole, trainings, works = load_points(tmp_path)
    step = make_joined_step(whole, trainings, [], World())
    assert not isinstance(step, LockstepStep)
    assert step.can_join({0: works[0], 1: works[1]._replace(batches=works[1].batches[:1])})
