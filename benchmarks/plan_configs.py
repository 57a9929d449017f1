"""The plans of ``configs/``: what each needs on the cards that its name promises.

    python benchmarks/plan_configs.py

Shapes are those of ``configs/bases``. ``tests/plan/test_configs.py`` compares the result with the
configurations and their comments, and plans one of them again.
"""

import re
from pathlib import Path
from typing import Any

from common import print_table, write_result

from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import RunConfig
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.run_plan import RunPlan, plan_run

CONFIGS = Path(__file__).parent.parent / "configs"


def list_configs() -> list[Path]:
    """Return the shipped configurations."""
    return sorted(CONFIGS.glob("*.yaml"))


def read_promised_cluster(path: Path) -> Cluster:
    """Return the cards of a name such as ``llama3_70b_qlora_4x8x80gb``."""
    match = re.search(r"_(?:(\d+)x)?(\d+)x(\d+)gb$", path.stem)
    assert match is not None, f"{path} names no cards"
    return Cluster(int(match[1] or 1), int(match[2]), int(match[3]) * 2**30)


def find_base_config(config: RunConfig) -> Path:
    """Return the file of ``configs/bases`` for ``base.path``."""
    return CONFIGS / "bases" / f"{Path(config.base.path).name.lower()}.json"


def plan_config(path: Path) -> RunPlan:
    """Plan a shipped configuration on the cards of its name."""
    config = load_config(path, [])
    planned = build_planned_model(config, find_base_config(config))
    return plan_run(planned, read_promised_cluster(path))


def main() -> None:
    found: dict[str, Any] = {}
    rows = []
    for path in list_configs():
        plan = plan_config(path)
        found[path.stem] = {
            "config": load_config(path, []).model_dump(mode="json"),
            "needed": plan.memory.total,
            "spare": plan.memory.spare,
            "phase": plan.memory.peak_phase,
            "items": {item.name: item.bytes for item in plan.memory.items},
        }
        rows.append([path.stem, plan.memory.total / 2**30, plan.memory.spare / 2**30])
        print(*rows[-1], flush=True)
    print_table(("configuration", "needed GiB", "left GiB"), rows)
    write_result("plan_configs", found)


if __name__ == "__main__":
    main()
