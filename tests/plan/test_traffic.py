from collections import Counter

from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.step_trace import StepTrace
from dist_peft.plan.traffic import count_rank_micro_batches, plan_traffic


def make_config(**engine: object) -> RunConfig:
    train = {"micro_batch": 1, "global_batch": 32}
    tree = {"base": {"path": "x"}, "data": {"train": ["y"]}, "engine": engine, "train": train}
    return parse_config(tree)


TRACE = StepTrace((0, 1), {}, gathered=Counter({"embedding": 100, "forward 0": 40, "head": 240}))


def test_blocks_are_gathered_twice_and_ends_as_traced() -> None:
    assert TRACE.gathered_block == 20
    traffic = plan_traffic(TRACE, 10, 1000, make_config(), Cluster(1, 4, 1))
    assert traffic.gathered == 380 + 8 * 40
    assert traffic.micro_batches == count_rank_micro_batches(make_config(), Cluster(1, 4, 1)) == 8
    assert traffic.card_bytes == (8 * 700 + 8 * 4000) * 3 // 4
    assert traffic.node_bytes == 0
    whole = make_config(reduce_gradients="step")  # gradients are sent once a step
    assert plan_traffic(TRACE, 10, 1000, whole, Cluster(1, 4, 1)).reduced == 4000


def test_kept_blocks_are_gathered_once_a_step() -> None:
    """Of ten blocks eight are not traced: five, then all of them and a traced one are kept."""
    five = plan_traffic(TRACE, 10, 1000, make_config(keep_gathered=5), Cluster(1, 4, 1))
    later = 380 + 3 * 40
    assert five.gathered == (8 * later + 5 * 20) // 8
    first = Counter({"embedding": 100, "forward 0": 40, "head": 220})
    trace = StepTrace((0, 1), {}, gathered=Counter({"head": 20}), gathered_first=first)
    nine = plan_traffic(trace, 10, 1000, make_config(keep_gathered=9), Cluster(1, 4, 1))
    assert nine.gathered == (360 + 8 * 20 + 7 * 20) // 8


def test_what_crosses_nodes() -> None:
    spread = plan_traffic(TRACE, 10, 1000, make_config(), Cluster(2, 4, 1))
    assert spread.node_bytes == (4 * 700) // 2 + 4 * 2000
    kept = plan_traffic(TRACE, 10, 1000, make_config(shard_group="node"), Cluster(2, 4, 1))
    assert kept.node_bytes == 2 * 4000 // 2
    alone = plan_traffic(TRACE, 10, 1000, make_config(), Cluster(1, 1, 1))
    assert alone.gathered == alone.card_bytes == 0 and alone.micro_batches == 32


def test_rows_that_travel_to_experts() -> None:
    """Of 40 bytes a block and pass half are rows on their two ways: they travel in recomputation
    too, and between nodes for each card."""
    gathered = Counter({"embedding": 100, "forward 0": 80, "head": 140, "backward": 80})
    trace = StepTrace((0, 1), {}, gathered=gathered, exchanged=2 * 60)
    config = make_config(gather_experts="tokens")
    found = plan_traffic(trace, 10, 1000, config, Cluster(2, 4, 1))
    assert found.gathered == 400 + 8 * (2 * 40 + 20)
    own = plan_traffic(trace, 10, 1000, config, Cluster(2, 4, 1), fetched=600)
    assert (found.reduced, own.reduced) == (4 * 4000, 4 * 1600)  # in each micro-batch
    whole = 4 * found.gathered
    assert found.node_bytes == (whole + 3 * 4 * 600) // 2 + 4 * 2000
    plain = make_config(gather_experts="tokens", activation_checkpointing=False)
    once = StepTrace((0, 1), {}, gathered=Counter({"forward 0": 80, "backward": 80}), exchanged=80)
    assert plan_traffic(once, 10, 1000, plain, Cluster(1, 4, 1)).gathered == 160 + 8 * 80
