import pytest
import torch

from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.engine.fake_ranks import fake_process_group
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.single import SingleEngine
from dist_peft.plan.traced_engine import make_traced_engine
from tests.support.tiny_engines import Model

CPU = torch.device("cpu")
TREE = {"base": {"path": "x"}, "data": {"train": ["y"]}}


@pytest.mark.parametrize("kind", ["auto", "zero"])
def test_the_engine_of_a_run(kind: str) -> None:
    config = parse_config({**TREE, "engine": {"kind": kind, "cpu_offload": "none"}})
    launcher = "deepspeed" if kind == "zero" else "torchrun"
    world = World(1, 3, 1, 3, launcher)
    with fake_process_group(world):
        engine = make_traced_engine(config, world, CPU)
        assert isinstance(engine, SingleEngine if kind == "zero" else Fsdp2Engine)
        model = Model()
        engine.shard_model(model, list(model.blocks))
        spans = {n: engine.local_row_span(p) for n, p in model.named_parameters()}
    assert spans["embedding.weight"].slice == slice(11, 22)


def test_one_process() -> None:
    engine = make_traced_engine(parse_config(TREE), World(), CPU)
    assert isinstance(engine, SingleEngine) and engine.bytes_gathered == 0
