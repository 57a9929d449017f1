"""Runs of several separate tasks, and the engines that they are trained on."""

from pathlib import Path
from typing import Any

from tests.support.tiny_runs import save_records, tiny_tree


def list_tree(directory: Path, count: int = 3, **changes: Any) -> dict[str, Any]:
    """Tasks of different data and number of rows; the third has no held-out source."""

    def records(name: str, rows: int, words: int) -> dict[str, str]:
        return {"path": str(save_records(directory / f"{name}.jsonl", rows, words)), "name": name}

    train = [records("long", 8, 9), records("short", 5, 3), records("other", 6, 6)]
    short = {
        "adapter": {"r": 3, "alpha": 8, "dropout": 0.2},  # odd: no even share for two ranks
        "data__train": train[:count],
        "data__eval": [
            {**records("short dev", 3, 3), "name": "short"},
            {**records("long dev", 2, 9), "name": "long"},
        ],
        "data__seq_len": 32,
        "train__tasks": "separate",
        "train__steps": 3,
        "save__every": 0,
    }
    return tiny_tree(directory, **{**short, **changes})


ENGINES: list[dict[str, Any]] = [
    {"kind": "fsdp2"},
    {"kind": "zero", "stage": 1},
    {"kind": "zero", "stage": 3},  # last: it replaces functional.linear for good
]
