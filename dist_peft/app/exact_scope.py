"""Facts on which the bits of a run with ``train.exact`` depend, besides its inputs.

They are stored in checkpoints, compared between ranks, and named where a resume changes them: a
processor of another model, or another number of threads, may add up a matrix product in another
order. Versions are stored for every run (``app.run_identity``).
"""

import torch

from dist_peft.core.config.run import RunConfig
from dist_peft.core.processor import describe_cpu
from dist_peft.core.world import World
from dist_peft.engine.compat import use_deterministic_kernels
from dist_peft.engine.exact_gradients import GradientScale

__all__ = ["SCOPE_KEYS", "describe_exact_scope", "describe_processor", "fix_kernels"]

_PROCESSOR, _THREADS = "processor of train.exact", "threads a process of train.exact"

_CPU_FACTS = ("vendor_id", "cpu family", "model", "model name")

SCOPE_KEYS = (_PROCESSOR, _THREADS)
"""Keys that a resume may change, with a warning."""


def describe_exact_scope(config: RunConfig, world: World) -> dict[str, object]:
    """Return processor model, threads and format of the sums, by key; empty without exact."""
    if not config.train.exact:
        return {}
    device = world.select_device(config.train.device)
    return {
        _PROCESSOR: describe_processor(device),
        _THREADS: torch.get_num_threads(),
        "gradients of train.exact": GradientScale.from_config(config.train).describe(),
    }


def fix_kernels(config: RunConfig, device: torch.device) -> None:
    """Choose kernels that add up in one order, for the rest of the process, on a GPU.

    Call before the first product. CPU kernels of torch have an order of their own for a number of
    threads.
    """
    if config.train.exact and device.type == "cuda":
        use_deterministic_kernels()


def describe_processor(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU with the instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{describe_cpu(_CPU_FACTS)} ({torch.backends.cpu.get_cpu_capability()})"
