"""A point of a sweep, seen as a run of its adapter alone."""

from typing import cast

import pytest
import torch
from torch import nn

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.app.model_setup import LoadedModel, ModelSetup, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.app.sweep.point_model import call_points_together, make_point_model
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.sweep_runs import sweep_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    config = parse_config(sweep_tree(tmp_path_factory.mktemp("sweep")))
    resolved = resolve_config(config)
    whole = load_weights(build_model(resolved), World(), CPU)
    adapter = cast(JoinedAdapter, whole.setup.adapter)
    made = []
    for number, point in enumerate(resolved.split_points().values()):
        own = {"config": point.run, "adapter": adapter.adapters[number]}
        setup = ModelSetup(**{**vars(whole.setup), **own})
        made.append(make_point_model(whole, setup, number, adapter.shares))
    return made


def test_parameters_have_the_names_and_values_of_a_run_alone(points: list[LoadedModel]) -> None:
    for point in points:
        config = point.setup.config
        alone = load_weights(build_model(resolve_config(config)), World(), CPU)
        wanted = trainable_parameters(alone.model)
        found = trainable_parameters(point.model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert point.trained == alone.trained and point.adapter_names == alone.adapter_names
        gathered, expected = point.gather_adapter(), alone.gather_adapter()
        assert all(torch.equal(gathered[name], expected[name]) for name in expected)


def test_forward_has_the_bits_of_a_run_alone(points: list[LoadedModel]) -> None:
    point = points[1]
    alone = load_weights(build_model(resolve_config(point.setup.config)), World(), CPU)
    for name, parameter in trainable_parameters(point.model).items():
        with torch.no_grad():
            parameter += 0.01
            alone.get_parameter(name).copy_(parameter)
    ids = torch.arange(6).view(1, 6)
    logits = []
    for built in (point, alone, points[2]):
        with inference_mode(built.model):
            logits.append(built.model(input_ids=ids, use_cache=False).logits)
        assert built.model.model.layers[0].self_attn.q_proj.training
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert point.model.config is point.setup.skeleton.model.config


def test_wrappers_of_points_are_called_one_inside_another(points: list[LoadedModel]) -> None:
    """And each has the layers of its point for children, whose hooks see the pass."""
    whole, seen = points[0].model.whole, list[int]()
    assert [len(p.model.own_layers) for p in points] == [14, 4, 2]
    calls = [(points[0].model, nn.Sequential(points[0].model)), (points[1].model, points[1].model)]
    adapters = [cast(LoraAdapter, point.setup.adapter) for point in points]
    handles = [
        layer.register_forward_hook(lambda *_, n=number: seen.append(n))
        for number, point in enumerate(points)
        for layer in point.model.own_layers
    ]
    for own in adapters:
        own.begin_micro_batch(0, torch.tensor([0]))
    shares = points[0].model._shares
    with torch.no_grad(), call_points_together(whole, calls) as call:
        assert call is calls[0][1] and points[0].model.inner is whole
        shares.split_batch([(0, 1), (1, 1)])
        call(torch.arange(12).view(2, 6))
    assert points[0].model.inner is None
    assert (seen.count(0), seen.count(1), seen.count(2)) == (14, 4, 0)
    for handle in handles:
        handle.remove()


def test_optimizers_are_apart(points: list[LoadedModel]) -> None:
    first, second = points[0], points[2]
    for point in (first, second):
        point.setup_optimizer(make_optimizer_factory(point.setup.config.train, CPU))
    for point in (first, second):
        for parameter in trainable_parameters(point.model).values():
            parameter.grad = torch.ones_like(parameter)
    before = [p.clone() for p in trainable_parameters(second.model).values()]
    count = sum(p.numel() for p in trainable_parameters(first.model).values())
    assert first.engine.step(1e-3, 1.0) == pytest.approx(count**0.5)
    after = trainable_parameters(second.model).values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is not None for p in after)
    assert all(p.grad is None for p in trainable_parameters(first.model).values())
