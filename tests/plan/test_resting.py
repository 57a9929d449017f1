"""Bytes at rest; ``test_run_plan`` compares them with real runs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_peft.core.config.io import parse_config
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import PlannedModel, build_planned_model
from dist_peft.plan.resting import BUCKET, RestingBytes, count_resting_bytes, optimizer_state_bytes
from tests.support.live_storage import odd_tree, save_odd_base
from tests.support.tiny_models import MIXTURES, save_model


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    base = save_odd_base(tmp_path_factory.mktemp("resting") / "base")
    return build_planned_model(parse_config(odd_tree(base)))


def count(planned: PlannedModel, ranks: int, rank: int = 0, **engine: object) -> RestingBytes:
    tree = odd_tree(Path(planned.source), engine=engine)
    config = parse_config(tree)
    world = Cluster(1, ranks, 1).make_world(config.engine, rank)
    skeleton = planned.skeleton
    return count_resting_bytes(skeleton.model, skeleton.blocks, config, world)


@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
def test_rows_of_all_ranks_are_the_whole_model(planned: PlannedModel, ranks: int) -> None:
    whole = sum(p.numel() * p.element_size() for p in planned.skeleton.model.parameters())
    found = [count(planned, ranks, rank) for rank in range(ranks)]
    assert sum(rank.own_rows for rank in found) == whole
    assert len({rank.device_total - rank.device["optimizer state"] for rank in found}) == 1


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_whole_experts_of_all_ranks_are_the_whole_model(tmp_path: Path, ranks: int) -> None:
    """Where experts stay on their ranks; their factors are cut as ever, without padding."""
    save_model(MIXTURES["qwen3_moe"], tmp_path / "base")
    mixture = build_planned_model(
        parse_config(odd_tree(tmp_path / "base", adapter={"target_modules": "all-linear"}))
    )
    parameters = dict(mixture.skeleton.model.named_parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters.values())
    found = [count(mixture, ranks, rank, gather_experts="tokens") for rank in range(ranks)]
    assert sum(rank.own_rows for rank in found) == whole
    factors = sum(p.numel() for n, p in parameters.items() if "experts" in n and p.requires_grad)
    assert {rank.fetched for rank in found} == {factors}
    assert not {count(mixture, ranks, rank).fetched for rank in range(ranks)} - {0}


def test_a_whole_base_on_each_rank_and_offloaded_shards(planned: PlannedModel) -> None:
    alone, spread = count(planned, 1), count(planned, 3)
    copied = count(planned, 3, shard_base=False)
    assert copied.frozen_rows == alone.frozen_rows > 2 * spread.frozen_rows
    offloaded = count(planned, 3, cpu_offload="params")
    assert set(offloaded.device) == {"buffers"}
    assert sum(offloaded.host.values()) + offloaded.device_total == spread.device_total


def test_buckets_of_a_sweep_are_as_large_as_its_gradients(planned: PlannedModel) -> None:
    tree = odd_tree(Path(planned.source), engine={"kind": "zero", "stage": 2})
    sweep = {"sweep": {"lr": [1e-3, 1e-4]}}
    buckets = {}
    for name, sections in {"alone": {}, "sweep": sweep}.items():
        config = parse_config({**tree, **sections})
        points = build_planned_model(config)
        world = Cluster(1, 3, 1).make_world(config.engine, 0)
        skeleton = points.skeleton
        found = count_resting_bytes(skeleton.model, skeleton.blocks, config, world)
        buckets[name] = found.device[BUCKET]
    assert buckets == {"alone": 4 * 50_000_000, "sweep": 4 * found.trainable}


@pytest.mark.parametrize("engine", [{"kind": "fsdp2"}, {"kind": "zero", "stage": 2}], ids=str)
def test_importances_are_two_more_moments(planned: PlannedModel, engine: dict[str, object]) -> None:
    tree = odd_tree(Path(planned.source), engine=engine)
    states = []
    for section in (tree["adapter"], {"kind": "adalora"}):
        config = parse_config({**tree, "adapter": section})
        world = Cluster(1, 3, 1).make_world(config.engine, 0)
        model = planned.skeleton.model
        found = count_resting_bytes(model, planned.skeleton.blocks, config, world)
        states.append(found.device["optimizer state"])
    share = -(-found.trainable // 3)
    assert states[1] - states[0] == pytest.approx(8 * share, rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_state_of_optimizers(optimizer: str) -> None:
    sizes = [4095, 4096, 99_999, 100_000]
    device, paged = optimizer_state_bytes(optimizer, sizes)
    if optimizer == "adamw":
        assert (device, paged) == (8 * sum(sizes) + 4 * len(sizes), 0)
        return
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = bitsandbytes.optim.AdamW8bit([nn.Parameter(torch.zeros(n)) for n in sizes])
    for index, parameter in enumerate(real.param_groups[0]["params"]):
        real.init_state(real.param_groups[0], parameter, 0, index)
    tensors = [t for s in real.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    assert device + paged == sum(storages.values())
    assert paged == (2 * 100_000 if optimizer.startswith("paged") else 0)
