from pathlib import Path

from dist_peft.adapters.lora.through_quantizer import ThroughLinear
from dist_peft.core.config.io import parse_config
from dist_peft.core.span import row_span
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.host import plan_host_peaks
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.resting import count_resting_bytes
from dist_peft.store.reader import RowReader
from tests.support.live_storage import odd_tree, save_odd_base


def test_slices_and_the_merged_model(tmp_path: Path) -> None:
    tree = odd_tree(save_odd_base(tmp_path / "base"), engine={"cpu_offload": "params"})
    planned = build_planned_model(parse_config(tree))
    skeleton, config = planned.skeleton, planned.config
    world = Cluster(1, 3, 1).make_world(config.engine)
    resting = count_resting_bytes(skeleton.model, skeleton.blocks, config, world)
    host = plan_host_peaks(skeleton, resting, 3)
    assert host.rest == sum(resting.host.values()) > 0
    assert plan_host_peaks(skeleton, resting, 3, 77).rest == host.rest + 77
    largest = 71 * 120 * 2  # a third of the embedding
    assert host.load == largest + 28 * 2**18 + host.rest
    file = tmp_path / "base/model.safetensors"
    assert 0 <= file.stat().st_size - host.verify < 20_000  # the header


def test_rows_that_are_encoded_again_rest_in_host_memory(tmp_path: Path) -> None:
    """As many bytes as a rank of a run keeps."""
    quant = {"kind": "int", "bits": 4, "group_size": 8}
    tree = odd_tree(save_odd_base(tmp_path / "base"))
    tree["base"]["quant"] = quant
    tree["adapter"] = {"r": 3, "through_quantizer": True}
    planned = build_planned_model(parse_config(tree))
    skeleton, config = planned.skeleton, planned.config
    world = Cluster(1, 3, 1).make_world(config.engine)
    resting = count_resting_bytes(skeleton.model, skeleton.blocks, config, world)
    plans = {shards: plan_host_peaks(skeleton, resting, shards) for shards in (1, 3)}
    expected = dict.fromkeys(plans, 0)
    with RowReader(skeleton.index) as reader:
        for layer in planned.skeleton.model.modules():
            if isinstance(layer, ThroughLinear):
                rows = reader.read_rows(layer.base.source).float()
                for shards in plans:
                    own = row_span(len(rows), shards, 0)
                    layer.prepare_base_rows(rows[own.slice], own, lambda t: t)
                    expected[shards] += layer.own_rows.nbytes
    assert {shards: plan.kept_rows for shards, plan in plans.items()} == expected
    assert plans[3].rest == expected[3] + sum(resting.host.values())
    assert plans[1].kept_weights == plans[1].kept_rows // 2  # files in bfloat16
    assert plans[1].factor == 0
    tree["adapter"]["through_zeros"] = True
    model = build_planned_model(parse_config(tree)).skeleton.model
    more = [m.base for m in model.modules() if isinstance(m, ThroughLinear)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pairs = sum(3 * (base.out_features + -(-base.in_features // 8)) for base in more)
    assert trained == resting.trainable + pairs and pairs
    solved = plan_host_peaks(skeleton, resting, 3, solves=True)
    linears = [m for m in skeleton.model.modules() if isinstance(m, FrozenLinear) and not m.is_head]
    factors = [4 * size**2 + 8 * size for m in linears if (size := -(-m.in_features // 8) * 8)]
    assert solved.factor == max(factors) == solved.rest - plans[3].rest
    assert solved.factor_files == sum(factors)


def test_a_start_in_8_bits_is_planned(tmp_path: Path) -> None:
    """As the first steps need it: rows of 8 bits for rows of 2."""
    tree = odd_tree(save_odd_base(tmp_path / "base"))
    tree["base"]["quant"] = {"kind": "int", "bits": 2, "group_size": 8}
    tree["adapter"] = {"r": 3, "through_quantizer": True}
    plain = build_planned_model(parse_config(tree))
    tree["adapter"] |= {"through_start": "8bit", "through_start_share": 0.25}
    started = build_planned_model(parse_config(tree))
    assert (plain.first_share, started.first_share) == (1.0, 0.25)
    pairs = [
        (few.base.packed.shape, layer.base)
        for few, layer in zip(
            plain.skeleton.model.modules(), started.skeleton.model.modules(), strict=True
        )
        if isinstance(layer, ThroughLinear) and isinstance(few, ThroughLinear)
    ]
    assert pairs
    for (rows, size), base in pairs:
        assert base.packed.shape == (rows, base.codec.num_row_bytes(base.in_features))
        assert base.packed.shape[1] > size and base.codec.name == "int8"
