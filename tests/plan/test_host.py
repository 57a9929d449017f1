from pathlib import Path

from dist_peft.core.config.io import parse_config
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.host import plan_host_peaks
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.resting import count_resting_bytes
from tests.support.live_storage import odd_tree, save_odd_base


def test_slices_and_the_merged_model(tmp_path: Path) -> None:
    tree = odd_tree(save_odd_base(tmp_path / "base"), engine={"cpu_offload": "params"})
    planned = build_planned_model(parse_config(tree))
    skeleton, config = planned.skeleton, planned.config
    world = Cluster(1, 3, 1).make_world(config.engine)
    resting = count_resting_bytes(skeleton.model, skeleton.blocks, config, world)
    host = plan_host_peaks(skeleton, resting, 3)
    assert host.rest == sum(resting.host.values()) > 0
    largest = 71 * 120 * 2  # a third of the embedding
    assert host.load == largest + 28 * 2**18 + host.rest
    file = tmp_path / "base/model.safetensors"
    assert 0 <= file.stat().st_size - host.verify < 20_000  # the header
