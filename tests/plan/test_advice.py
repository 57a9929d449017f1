from dataclasses import replace
from pathlib import Path

from dist_peft.core.config.io import parse_config
from dist_peft.plan.advice import list_changes
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import plan_run
from tests.support.live_storage import odd_tree, save_odd_base


def test_options_that_free_memory_largest_first(tmp_path: Path) -> None:
    tree = odd_tree(save_odd_base(tmp_path / "base"), train={"global_batch": 4})
    planned = build_planned_model(parse_config(tree))
    cluster = Cluster(1, 2, 2**40)
    roomy = plan_run(planned, cluster)
    assert len(list_changes(roomy, planned.config, cluster)) == 1
    plan = replace(roomy, memory=replace(roomy.memory, limit=2**29))
    lines = list_changes(plan, planned.config, cluster)
    assert lines[1] == "It does not fit; what would free about so much:"
    freed = [float(line.split()[0]) for line in lines[2:]]
    assert freed == sorted(freed, reverse=True) and len(freed) >= 5
    text = "\n".join(lines)
    for option in ("twice as many ranks", "train.micro_batch=1", "adapter.r=2", "adamw8bit"):
        assert option in text
