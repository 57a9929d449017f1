"""One message that says what to lower."""

from pathlib import Path

import pytest
import torch

from dist_peft.app.out_of_memory import describe_out_of_memory, remember_memory_options
from dist_peft.core.config.io import parse_config
from dist_peft.core.progress_beat import reset_beat, start_step_phase
from tests.support.tiny_runs import tiny_tree

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.90 GiB in use. If "
    "reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)


@pytest.fixture(autouse=True)
def _forget() -> None:
    reset_beat()


def test_options_that_can_still_be_lowered_are_named(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, train__micro_batch=4, engine={"activation_checkpointing": False})
    remember_memory_options(parse_config(tree))
    start_step_phase(3, "forward and backward")
    assert describe_out_of_memory(torch.OutOfMemoryError(CUDA)) == (
        "out of GPU memory in 'forward and backward' of step 3 (Tried to allocate 2.50 GiB. GPU 0 "
        "has a total capacity of 79.10 GiB of which 1.20 GiB is free): lower train.micro_batch "
        "(now 4) or data.seq_len (now 16) or adapter.r (now 4), set base.quant.kind: nf4 or "
        "engine.activation_checkpointing: true or train.optimizer: adamw8bit, or use more ranks; "
        "dist-peft plan estimates it"
    )


def test_options_at_their_lowest_are_not_named(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, base__quant={}, train__optimizer="adamw8bit")
    remember_memory_options(parse_config(tree))
    line = describe_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert line is not None and "micro_batch" not in line and "quant" not in line
    assert ", set " not in line and "before the first step: lower" in line


def test_a_host_runs_out_of_memory_too() -> None:
    torch_says = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    for error in (MemoryError(), RuntimeError(f"{torch_says} 4096 bytes. Error code 12")):
        line = describe_out_of_memory(error)
        assert line is not None and line.startswith("out of host memory in 'start'")


def test_another_error_is_none() -> None:
    assert describe_out_of_memory(RuntimeError("gloo: connection closed")) is None
