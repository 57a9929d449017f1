"""bfloat16 of Triton's interpreter, repaired for tests.

The interpreter (3.6 to 3.9) keeps bfloat16 as its bits in ``uint16``: it cuts float32 off in place
of rounding, and adds, multiplies and ``tl.dot``s the bits themselves. ``repair_bfloat16`` replaces
three methods of its builder by ones that compute in float32 and round as torch does. A compiled
kernel needs none of it.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["pass_floats_as_numbers", "repair_bfloat16"]


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bits(numbers: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))
    return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def repair_bfloat16() -> None:
    """Repair the interpreter of this process; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "rounds_bfloat16"):
        return
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def cast_rounding(self: Any, source: Any, wanted: Any) -> Any:
        before, after = source.dtype.scalar, wanted.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, wanted)
        numbers = _widen(source.data) if before == tl.bfloat16 else source.data
        if after == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bits(numbers), after)
        return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(after)), after)

    def dot_widened(self: Any, a: Any, b: Any, total: Any, *others: Any) -> Any:
        wide = [
            interpreter.TensorHandle(_widen(t.data), tl.float32) if _is_bfloat16(t) else t
            for t in (a, b)
        ]
        return dot(self, *wide, total, *others)

    def binary_widened(self: Any, left: Any, right: Any, operator: Any) -> Any:
        if not _is_bfloat16(left):
            return binary(self, left, right, operator)
        result = operator(_widen(left.data), _widen(right.data))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(_round_to_bits(result), tl.bfloat16)

    builder.cast_impl = cast_rounding
    builder.create_dot = dot_widened
    builder.binary_op = binary_widened
    builder.rounds_bfloat16 = True


def pass_floats_as_numbers() -> None:
    """Let kernels get float arguments as float32 scalars, as compiled ones do, and not as Python's,
    which have no methods. A second call does nothing."""
    convert = interpreter._implicit_cvt
    if getattr(convert, "takes_floats", False):
        return

    def convert_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    convert_floats.takes_floats = True  # type: ignore[attr-defined]
    interpreter._implicit_cvt = convert_floats
