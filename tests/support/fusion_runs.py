"""Runs of AdapterFusion: tiny adapters of one base, and a fusion of them."""

from pathlib import Path
from typing import Any

from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.story_runs import train
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_records, tiny_tree

NAMES = ("rte", "mrpc")


def train_adapters(
    directory: Path, tree: dict[str, Any], **settings: Any
) -> list[str | dict[str, str]]:
    """Stage 1: an adapter of each name, each of its own width, far from its start.

    Args:
        directory: gets ``tasks/NAME``, as a run of separate tasks has them.
        tree: a run on the base; its adapter and directory are replaced.
        settings: of the adapters.

    Returns:
        ``adapter.adapters`` of a fusion.
    """
    for number, name in enumerate(NAMES):
        adapter = {"kind": "bottleneck", "reduction_factor": 20 - 12 * number, **settings}
        run = {"dir": str(directory / "tasks" / name), "every": 0}
        train_section = {**tree["train"], "lr": 0.01, "steps": 4, "seed": number}
        whole = {**tree, "adapter": adapter, "save": run, "train": train_section}
        assert train(World(), whole) == 0
        close_log()
    paths = [str(directory / "tasks" / name / "adapter") for name in NAMES]
    return [paths[0], {"path": paths[1], "name": NAMES[1]}]


def fusion_tree(
    directory: Path, placement: str = "pfeiffer", family: str = "llama", **changes: Any
) -> dict[str, Any]:
    """Stage 2, stage 1 having been run: unpacked rows, not as many a step as two ranks divide."""
    tree = tiny_tree(directory, train__global_batch=5, train__steps=3)
    save_model(CONFIGS[family], directory / "base")
    tree["data"]["train"] = [str(save_records(directory / "twelve.jsonl", 12))]
    fused = train_adapters(directory / placement, tree, placement=placement)
    return changed({**tree, "adapter": {"kind": "fusion", "adapters": fused}}, **changes)


def changed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``section__key=value`` changes a tree."""
    tree = dict(tree)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    return tree
