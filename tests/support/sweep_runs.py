"""Sweeps on the tiny model, and each of their points as a run alone."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from dist_peft.app.commands import train as train_app
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.tiny_runs import tiny_tree

POINTS: list[dict[str, Any]] = [
    {"lr": 1e-2, "seed": 1, "r": 3, "alpha": 8},  # odd: no even share for two ranks
    {"lr": 2e-3, "r": 5, "alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    {"lr": 5e-3, "seed": 2, "target_modules": ["v_proj"]},
]


def sweep_tree(directory: Path, **changes: Any) -> dict[str, Any]:
    """Three points of different rates, seeds, ranks and targets, with dropout on a packed base."""
    short: dict[str, Any] = {
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.2},
        "base__quant": {"kind": "int", "bits": 4, "group_size": 8},
        # far below most gradients, above their rounding
        "train__eps": 1e-5,
        "train__steps": 4,
        "train__global_batch": 5,
        "train__micro_batch": 2,
        "train__eval_every": 2,
        "save__every": 2,
        "sweep": {"points": POINTS},
    }
    return tiny_tree(directory, **{**short, **changes})


def train_until(tree: dict[str, Any], asked: int) -> int:
    """``train`` in this process with a signal that comes before a loop asks for the ``asked``-th
    time whether to stop; its exit code."""
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count >= asked

    with mock.patch.object(train_app, "catch_stop_signals", return_value=nullcontext(stop)):
        return train_app.train_from_config(parse_config(tree), World())


def alone(point: Path, directory: Path) -> dict[str, Any]:
    """The configuration that a point's directory holds, in another directory."""
    tree: dict[str, Any] = load_config(point / "config.yaml").model_dump(mode="json")
    return {**tree, "save": {**tree["save"], "dir": str(directory)}}


def assert_same_run(point: Path, other: Path, tolerance: float = 1e-6) -> None:
    """Losses and evaluations within ``tolerance`` relative to those of ``other``, and each value of
    the adapters within as much, absolute."""
    found, wanted = (read_metrics(run / "metrics.jsonl") for run in (point, other))
    assert [record.step for record in found] == [record.step for record in wanted]
    for mine, own in zip(found, wanted, strict=True):
        assert (mine.lr, mine.tokens, mine.samples) == (own.lr, own.tokens, own.samples)
        for key in ("loss", "eval_loss", "eval_loss_before"):
            pair = torch.tensor([getattr(r, key) or 0.0 for r in (mine, own)], dtype=torch.float64)
            torch.testing.assert_close(pair[0], pair[1], rtol=tolerance, atol=0)
    adapters = [load_file(run / "adapter/adapter_model.safetensors") for run in (point, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, want in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], want, rtol=0, atol=tolerance)
