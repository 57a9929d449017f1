from collections import Counter

import pytest

from dist_peft.plan.cluster import GPUS, Cluster
from dist_peft.plan.duration import EFFICIENCY, LINK_EFFICIENCY, plan_duration
from dist_peft.plan.step_trace import StepTrace
from dist_peft.plan.traffic import Traffic

TRACE = StepTrace((0, 1), {}, flops=Counter({"forward 0": 10**14, "head": 10**14}))


def test_the_slowest_part_decides() -> None:
    traffic = Traffic(0, 10**12, 10**12, 0, micro_batches=4)
    cluster = Cluster(2, 8, 1, GPUS["h100"], link=50e9)
    found = plan_duration(TRACE, 4, 10**9, 1000, traffic, cluster)
    assert found is not None
    assert found.flops == 4 * (2e14 + 2 * 5e13)
    assert found.products == pytest.approx(found.flops / (989e12 * EFFICIENCY))
    assert found.seconds == found.network == pytest.approx(1e12 / (50e9 * LINK_EFFICIENCY))
    assert found.limited_by == "the network"
    assert found.tokens_per_second == pytest.approx(4 * 1000 * 16 / found.seconds)
    alone = plan_duration(TRACE, 4, 10**9, 1000, traffic, Cluster(1, 8, 1, GPUS["h100"]))
    assert alone is not None and alone.network == 0 and alone.limited_by == "the cards' links"


def test_rows_are_encoded_again_after_everything_else() -> None:
    cluster = Cluster(1, 8, 1, GPUS["h100"])
    traffic = Traffic(0, 10**12, 10**12, 0, micro_batches=4)
    plain = plan_duration(TRACE, 4, 10**9, 1000, traffic, cluster)
    through = plan_duration(
        *(TRACE, 4, 10**9, 1000, traffic, cluster), kept_weights=10**9, kept_bytes=2 * 10**9
    )
    assert plain is not None and through is not None and plain.encoding == 0
    assert through.encoding == pytest.approx(2e9 / 25e9 + 60e9 / 3.35e12)
    assert through.seconds == pytest.approx(plain.seconds + through.encoding)
    assert through.tokens_per_second < plain.tokens_per_second


def test_block_inputs_cross_the_hosts_link_twice() -> None:
    parts = (TRACE, 4, 10**9, 1000, Traffic(0, 0, 0, 0, micro_batches=4))
    plain = plan_duration(*parts, Cluster(1, 1, 1, GPUS["h100"]))
    sent = plan_duration(*parts, Cluster(1, 1, 1, GPUS["h100"]), offloaded=50 * 10**9)
    assert plain is not None and sent is not None and plain.offloading == 0
    assert sent.seconds == sent.offloading == pytest.approx(4 * 2 * 50e9 / 25e9)
    assert sent.limited_by == "the link to host memory"


def test_kept_products_are_decoded_once_less() -> None:
    parts = (TRACE, 4, 10**9, 1000, Traffic(0, 0, 0, 0, 1), Cluster(1, 1, 1, GPUS["h100"]))
    found = [plan_duration(*parts, decodes_again=again) for again in (True, False)]
    assert found[0] is not None and found[1] is not None
    assert found[1].dequantizing == pytest.approx(found[0].dequantizing * 2 / 3)


def test_no_card_no_time() -> None:
    assert plan_duration(TRACE, 4, 1, 1, Traffic(0, 0, 0, 0, 1), Cluster(1, 1, 1)) is None
