from pathlib import Path

from dist_peft.core.config.io import parse_config
from dist_peft.plan.cluster import GPUS, Cluster
from dist_peft.plan.plan_report import format_byte_count, format_plan
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import plan_run
from tests.support.live_storage import odd_tree, save_odd_base


def test_units() -> None:
    assert format_byte_count(24 * 2**30) == "24.00 GiB"
    assert format_byte_count(100 * 2**20) == "0.10 GiB"
    assert format_byte_count(3 * 2**20) == "3.00 MiB"
    assert format_byte_count(-512) == "-0.5 KiB"


def test_parts_add_up_and_a_card_too_small_is_told(tmp_path: Path) -> None:
    planned = build_planned_model(parse_config(odd_tree(save_odd_base(tmp_path / "base"))))
    cluster = Cluster(2, 3, 2**29, GPUS["h100"], 50e9)
    lines = format_plan(plan_run(planned, cluster), planned.config, cluster)
    text = "\n".join(lines)
    assert "on 2 x 3 cards of 0.50 GiB, engine fsdp2" in text
    assert "MISSING" in text and "It does not fit" in text and "adapter.r=2" in text
    assert "received by a node over the network" in text
    assert "projection, not measured" in text
