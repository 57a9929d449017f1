"""Elementary functions whose float32 results are the same bits on every machine.

The bytes of a codec must not depend on the machine that wrote it. Addition, subtraction,
multiplication, division and comparison are correctly rounded by IEEE 754 everywhere; a maximum or
minimum is exact in any order. Everything else is up to a maths library: ``torch.sqrt`` of float32
on a CPU goes to MKL's vector library, which is 1 ulp off for about one value in six, where numpy's
and CUDA's square roots are correctly rounded. So codecs take square roots from this module, and
use no ``exp``, ``log``, ``pow`` or plain ``sum`` (whose order depends on threads) at all.
``docs/numerics.md`` lists the guarantees.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["exact_sqrt"]


def exact_sqrt(values: Tensor) -> Tensor:
    """Correctly rounded square root of float32 ``values``, any shape; a new tensor.

    numpy computes it with the processor's own instruction, which IEEE 754 requires to round
    correctly; CUDA compiles ``sqrtf`` to its correctly rounded form by default.
    """
    assert values.dtype == torch.float32, values.dtype
    if values.device.type == "cpu":
        return torch.from_numpy(np.asarray(np.sqrt(values.detach().contiguous().numpy())))
    return values.detach().sqrt()
