"""uint8 shards on every supported torch; the old one in an interpreter of its own."""

import inspect
import os
import re
import subprocess
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from transformers.models.llama.modeling_llama import LlamaAttention

from dist_peft.core.world import World
from dist_peft.engine.compat import (
    allow_integer_parameters,
    count_deepspeed_gathers,
    keep_gradient_sums,
    route_rotary_function,
    watch_storage_resizes,
)
from tests.support.dist import run_ranks

ROOT = Path(__file__).parents[2]
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.arange(21, dtype=torch.uint8).view(7, 3) * 12, False)
        self.change = nn.Parameter(torch.ones(7, 3))

    def forward(self) -> torch.Tensor:
        return (self.packed.float() * self.change).sum()


def _shard_bytes(world: World) -> tuple[torch.Tensor, torch.Tensor, bool, bool]:
    allow_integer_parameters()
    allow_integer_parameters()  # a second call changes nothing
    model = Bytes()
    fully_shard(model)
    model().backward()
    packed = model.packed
    assert packed.dtype == torch.uint8 and packed.to_local().shape[0] == (4, 3)[world.rank]
    gradient = model.change.grad
    assert gradient is not None
    whole = packed.full_tensor()
    return whole, gradient.full_tensor(), packed.requires_grad, model.change.requires_grad


@pytest.mark.dist
def test_bytes_survive_two_ranks() -> None:
    original = Bytes()
    for whole, gradient, bytes_learn, change_learns in run_ranks(_shard_bytes, 2):
        assert torch.equal(whole, original.packed)
        assert torch.equal(gradient, original.packed.float())  # FSDP's mean of equal ones
        assert not bytes_learn and change_learns


@pytest.mark.skipif(VERSION < (2, 12), reason="this torch needs the patch")
def test_newer_torch_is_left_alone() -> None:
    allow_integer_parameters()
    assert _fsdp_param.nn is nn


@pytest.mark.skipif(VERSION >= (2, 12), reason="torch 2.12 and later are not patched")
def test_older_torch_is_patched_in_that_module_only() -> None:
    allow_integer_parameters()
    assert _fsdp_param.nn is not nn
    assert _fsdp_param.nn.Module is nn.Module
    assert _fsdp_param.nn.Parameter(torch.zeros(2)).requires_grad
    assert not _fsdp_param.nn.Parameter(torch.zeros(2, dtype=torch.uint8)).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(torch.zeros(2, dtype=torch.uint8))


def test_the_patch_goes_when_the_oldest_torch_needs_none() -> None:
    floor = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert floor is not None
    assert (int(floor[1]), int(floor[2])) < (2, 12), "remove allow_integer_parameters"


def test_every_gather_of_deepspeed_is_counted_and_still_runs() -> None:
    calls: list[object] = []
    names = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced")
    backend = SimpleNamespace(**{n: lambda *a, **k: calls.append((a, k)) for n in names})
    counts: list[int] = []
    library = SimpleNamespace(comm=SimpleNamespace(comm=SimpleNamespace(cdb=backend)))
    count_deepspeed_gathers(library, counts.append)
    whole, part = torch.empty(6), torch.empty(3, dtype=torch.bfloat16)
    backend.all_gather([part, part], part)
    backend.all_gather_into_tensor(output_tensor=whole, input_tensor=part)
    backend.all_gather_coalesced([whole, whole], [part])
    assert counts == [12, 24, 48] and len(calls) == 3


def test_resizes_are_reported_inside_the_context_only() -> None:
    resize = torch.UntypedStorage.resize_
    storage = torch.empty(8, dtype=torch.uint8).untyped_storage()
    sizes: list[int] = []
    with watch_storage_resizes(lambda changed: sizes.append(changed.nbytes())):
        storage.resize_(3)
        storage.resize_(0)
    storage.resize_(5)
    assert sizes == [3, 0] and storage.nbytes() == 5
    assert torch.UntypedStorage.resize_ is resize


@pytest.mark.dist
@pytest.mark.skipif(VERSION < (2, 12), reason="this is an old torch already")
def test_torch_211() -> None:
    """This file once more under torch 2.11."""
    python = os.environ.get("DIST_PEFT_TORCH211_PYTHON")
    if not python:
        pytest.skip("DIST_PEFT_TORCH211_PYTHON names no interpreter with torch 2.11")
    script = (
        "import sys, pytest, torch; "
        "assert torch.__version__.startswith('2.11.'), torch.__version__; "
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', {str(Path(__file__))!r}]))"
    )
    done = subprocess.run(
        [python, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout, done.stdout


def test_a_rotary_function_is_routed_once() -> None:
    """Goes with the patch once no file of a family calls the function by its name."""
    source = types.ModuleType("modeling")
    source.apply_rotary_pos_emb = lambda q, k, cos, sin, dim=1: (q, k, dim)  # type: ignore[attr-defined]
    calls: list[int] = []

    def rotate(own: Any, q: int, k: int, cos: int, sin: int) -> Any:
        calls.append(q)
        return own(q, k, cos, sin)

    for _ in range(2):
        route_rotary_function(source, rotate)
    assert source.apply_rotary_pos_emb(5, 6, 0, 0) == (5, 6, 1) and calls == [5]
    assert source.apply_rotary_pos_emb(5, 6, 0, 0, dim=2) == (5, 6, 2) and calls == [5]
    assert "apply_rotary_pos_emb(query_states" in inspect.getsource(LlamaAttention.forward)


class ReadTwice(nn.Module):
    """``7e7 x + x``, with a wrapper of its input as ZeRO-3's (``parameter_offload``, 0.19)."""

    def __init__(self) -> None:
        super().__init__()
        self.is_done = False
        outer = self

        class AfterBackward(torch.autograd.Function):
            @staticmethod
            def forward(value: torch.Tensor) -> torch.Tensor:
                return value.detach()

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
                ctx.module = outer

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> Any:
                ctx.module.is_done = True
                return grads

        self.post_bwd_fn = AfterBackward
        self.register_forward_pre_hook(lambda m, args: tuple(m.post_bwd_fn.apply(x) for x in args))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0**24 + x


def _find_gradient(module: ReadTwice | None) -> float:
    """Of a tensor that is read once outside of the module and twice inside, which has no module
    where it is None."""
    x = torch.ones(1, requires_grad=True)
    y = x * 1.0
    inside = y * 2.0**24 + y if module is None else module(y)
    (inside + y).sum().backward()
    assert x.grad is not None
    return float(x.grad)


def test_gradients_are_added_up_as_without_zero_3() -> None:
    wrapped, kept = ReadTwice(), ReadTwice()
    keep_gradient_sums(nn.Sequential(kept))
    plain = _find_gradient(None)
    assert _find_gradient(wrapped) != plain and wrapped.is_done
    assert _find_gradient(kept) == plain and kept.is_done


def test_deepspeed_calls_the_function_that_is_replaced() -> None:
    offload = pytest.importorskip("deepspeed.runtime.zero.parameter_offload")
    assert "module.post_bwd_fn.apply" in Path(offload.__file__).read_text()
