"""Weights processed by several threads."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.weight_threads import (
    MERGE_MEMORY,
    count_merge_threads,
    process_weights,
)
from dist_peft.store.format import TensorSpec
from tests.support.export_runs import make_run


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weight(name: str, path: str) -> BaseWeight:
    return BaseWeight(TensorSpec(name, torch.float32, (1, 1)), path, None, name)


@pytest.mark.usefixtures("two_threads")
def test_threads_stay_within_their_memory() -> None:
    assert count_merge_threads(1) == 2
    assert count_merge_threads(MERGE_MEMORY // 8) == 2
    assert count_merge_threads(MERGE_MEMORY // 8, 1) == 1
    assert count_merge_threads(MERGE_MEMORY) == 1


def test_tensors_of_a_weight_stay_in_order_on_one_thread() -> None:
    seen: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}

    def process(found: BaseWeight, stop: Callable[[], bool]) -> None:
        time.sleep(0.001)
        seen[found.path].append((found.name, threading.get_ident()))
        assert torch.get_num_threads() == 1

    weights = [weight(f"{path}{i}", path) for i in range(5) for path in "ab"]
    process_weights(weights, process, 3)
    for path, calls in seen.items():
        assert [name for name, _ in calls] == [f"{path}{i}" for i in range(5)]
        assert len({thread for _, thread in calls}) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_stops_the_others(threads: int) -> None:
    calls = []

    def process(found: BaseWeight, stop: Callable[[], bool]) -> None:
        calls.append(found.name)
        if found.name == "1":
            raise ValueError("broken")
        for _ in range(1000):
            if stop():
                return
            time.sleep(0.001)

    weights = [weight(str(i), str(i)) for i in range(1, 30)]
    with pytest.raises(ValueError, match="broken"):
        process_weights(weights, process, threads)
    assert len(calls) <= 3


@pytest.mark.usefixtures("two_threads")
def test_two_threads_write_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path, None)
    merged = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = tmp_path / f"out-{threads}"
        merge_model(run.base, run.directory, run.adapter_dir, out, chunk_bytes=4096)
        merged[threads] = load_file(out / "model.safetensors")
    for name, tensor in merged[1].items():
        assert torch.equal(merged[2][name], tensor), name
