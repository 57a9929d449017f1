"""Short runs of the stories260K model on TinyStories, interrupted and resumed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from dist_peft.app.commands import train as train_app
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics


def run_config(shared_data: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A short fp32 run of stories260K on TinyStories; ``section__key=value`` changes it."""
    tree: dict[str, Any] = {
        "base": {"path": str(shared_data / "stories260K-hf"), "compute_dtype": "float32"},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": [
                {
                    "path": str(shared_data / "tinystories-1000" / "tinystories_clean.jsonl"),
                    "limit": 60,
                }
            ],
            "seq_len": 128,
            "cache_dir": str(tmp_path / "cache"),
        },
        # far below most gradients, above their rounding: with 1e-8 Adam makes whole steps of the
        # difference between two ways to sum, and losses differ by what the processor rounds
        "train": {
            "micro_batch": 1,
            "global_batch": 4,
            "lr": 5e-3,
            "eps": 1e-5,
            "steps": 20,
            "device": "cpu",
            "samples": 0,  # a test of their own
        },
        "save": {"dir": str(tmp_path / "run")},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    return tree


NF4 = {"kind": "nf4"}


STOP, STEPS = 4, 8
"""Of ``short``: with PiSSA the loss is below the first only at the sixth step."""


def train(world: World, tree: dict[str, Any], stop_after: int | None = None) -> int:
    """``train`` with a signal that comes during step ``stop_after``; its report has no curves,
    which take longer to draw than these runs."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_after

    with (
        mock.patch.object(train_app, "catch_stop_signals", return_value=nullcontext(stop)),
        mock.patch("dist_peft.train.report.PLOTS", ()),
    ):
        return train_app.train_from_config(parse_config(tree), world)


def losses(directory: Path) -> list[float]:
    return [record.loss for record in read_metrics(directory / "metrics.jsonl")]


def short(shared_data: Path, tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    save = {"dir": str(tmp_path / name), "every": 0}
    defaults = {"train__steps": STEPS, "base__quant": {"kind": "nf4"}}
    return run_config(shared_data, tmp_path, save=save, **{**defaults, **changes})
