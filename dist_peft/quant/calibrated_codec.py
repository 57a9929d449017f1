"""Integers whose codes GPTQ chooses, from a factor that was made once and lies in a file.

``AffineCodec`` rounds each weight to nearest. ``CalibratedCodec`` writes the same rows, and chooses
scales, zeros and codes column by column, each column making up for the errors of those before it
(``quant.gptq``)::

    encode(w) = solve_weight_rows(w, factor)      factor: of the Hessian of the layer's inputs

Given the factor a row depends on its own weights alone, through elementwise operations that round
once, so that this is a codec as any other: ``encode(w)[a:b]`` equals ``encode(w[a:b])``, bit for
bit, whatever the ranks, chunks and threads.

The factor is read for each call, because the factors of a model are larger than the model: ``4
in^2`` bytes for each input, ``in / out`` times those of the weight in float32. On a CPU the file is
mapped, not copied.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.gptq import HessianFactor, solve_weight_rows

__all__ = ["CalibratedCodec", "StoredFactor"]


@dataclass(frozen=True)
class StoredFactor:
    """A ``HessianFactor`` in a safetensors file.

    Attributes:
        file: its path.
        padded: columns of the weight, padded to whole groups.
    """

    file: str
    padded: int

    @staticmethod
    def write_factor(factor: HessianFactor, file: Path) -> None:
        """Write a factor, ``order`` and ``upper``."""
        tensors = {"order": factor.order.cpu(), "upper": factor.upper.cpu().contiguous()}
        file.write_bytes(save(tensors))

    def read_factor(self, device: torch.device) -> HessianFactor:
        """Read the factor to ``device``.

        Raises:
            UserError: no such file, a damaged one, or one for another weight.
        """
        try:
            tensors = load_file(self.file)
            order, upper = tensors["order"], tensors["upper"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"cannot read GPTQ's factor {self.file}: {error}; remove the directory base/ of "
                "the run, so that it is made again"
            ) from None
        whole = torch.arange(self.padded)
        if upper.shape != (self.padded, self.padded) or not torch.equal(order.sort()[0], whole):
            raise UserError(
                f"GPTQ's factor {self.file} is not for a weight of {self.padded} columns; remove "
                "the directory base/ of the run, so that it is made again"
            )
        return HessianFactor(order.to(device), upper.to(device))


@dataclass(frozen=True)
class CalibratedCodec(AffineCodec):
    """Integers with integer zeros, encoded by GPTQ; decoded as ``AffineCodec`` does.

    Attributes:
        factor: of the inputs of the one linear whose rows are encoded.
    """

    factor: StoredFactor = StoredFactor("", 0)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: see ``solve_weight_rows``.
            UserError: see ``StoredFactor.read_factor``.
        """
        factor = self.factor.read_factor(weight.device)
        return solve_weight_rows(weight, factor, AffineCodec(self.bits, self.group_size))
