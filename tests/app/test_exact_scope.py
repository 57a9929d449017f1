"""What the bits of an exact run depend on besides its inputs."""

import os

import pytest
import torch

from dist_peft.app.exact_scope import (
    SCOPE_KEYS,
    describe_exact_scope,
    describe_processor,
    fix_kernels,
)
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.processor import describe_cpu
from dist_peft.core.world import World


def exact_config(exact: bool) -> RunConfig:
    tree = {
        "base": {"path": "b"},
        "data": {"train": ["x"]},
        "train": {"exact": exact, "device": "cpu"},
    }
    return parse_config(tree)


def scope(exact: bool) -> dict[str, object]:
    return describe_exact_scope(exact_config(exact), World())


def test_facts_are_recorded_where_bits_are_promised() -> None:
    assert scope(False) == {}
    found = scope(True)
    assert set(found) == {*SCOPE_KEYS, "gradients of train.exact"}
    assert found[SCOPE_KEYS[1]] == torch.get_num_threads()
    assert str(found["gradients of train.exact"]).startswith("int64, unit 2^-47")


def test_processor_without_proc() -> None:
    named = describe_processor(torch.device("cpu"))
    assert torch.backends.cpu.get_cpu_capability() in named and len(named) > 12
    assert describe_cpu() in named


def test_kernels_are_fixed_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for exact, device in ((False, "cuda"), (True, "cpu")):
        fix_kernels(exact_config(exact), torch.device(device))
    assert not calls and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    fix_kernels(exact_config(True), torch.device("cuda"))
    assert calls == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
