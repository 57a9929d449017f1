"""Compile what launchers would launch, for a GPU that is not there.

Triton compiles offline: ``ptxas`` and ``cuobjdump`` are in its wheel. A kernel is specialized by
its arguments (which are 1, which are divisible by 16, which pointers are aligned), so that the
launcher itself has to run: ``compile_launches`` lets it, on CPU tensors, and compiles in place of
launching. Outputs stay unset. Not in a process with ``TRITON_INTERPRET``.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

__all__ = ["compile_launches", "list_instructions", "read_resources"]

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _AbsentDriver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_launches(capability: int) -> Iterator[list[Any]]:
    """Yield a list of the kernels that are launched inside, compiled for ``sm_CAPABILITY``."""
    compiled: list[Any] = []
    run, driver = JITFunction.run, triton.runtime.driver
    active = driver._active

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_alone
    driver.set_active(_AbsentDriver(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def read_resources(kernel: Any) -> dict[str, int]:
    """``REG`` registers a thread; bytes of ``STACK`` and ``LOCAL``, where spills go, ``SHARED``."""
    found = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", _dump(kernel, "-res-usage"))
    return {name: int(number) for name, number in found}


def list_instructions(kernel: Any) -> list[str]:
    """Machine instructions without their operands, such as ``LDG.E``."""
    pattern = r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)"
    found = re.findall(pattern, _dump(kernel, "-sass"), re.MULTILINE)
    return [name for name in found if name != "NOP"]


def _dump(kernel: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
