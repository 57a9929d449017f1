"""Elementary functions on the way to bytes, correctly rounded on every machine.

IEEE 754 fixes the last bit of sums, products, quotients and square roots; a maths library need not
keep to it. On CPUs torch hands ``sqrt`` of large tensors to MKL's vector library, whose float32
results are one unit in the last place off for about every sixth value, so that packed bytes would
differ between processors, and between CPU and CUDA (pytorch issue 31250).
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["square_root"]


def square_root(numbers: Tensor) -> Tensor:
    """Correctly rounded square roots of a float32 or float64 tensor, same shape and device.

    On a CPU numpy computes them with the processor's own instruction. CUDA's ``sqrtf`` and ``sqrt``
    are correctly rounded as torch compiles them, by CUDA's documentation.
    """
    assert numbers.dtype in (torch.float32, torch.float64), numbers.dtype
    if numbers.device.type != "cpu":
        return numbers.sqrt()
    return torch.from_numpy(np.sqrt(np.atleast_1d(numbers.detach().numpy()))).reshape(numbers.shape)
