"""Dropout whose mask depends on the sample, not on a stream of random numbers.

An element is dropped by a hash of where it is: feature ``j`` of position ``i`` of a sample, in one
linear, in one optimizer step::

    h = (a b + d)^2 + c   mod 2^32        dropped where h, as a signed number, is below a threshold

    a, c   int32, by (run seed, step, sample, i): drawn once a micro-batch, shared by all linears
    b, d   int32, by (run seed, module path, j): drawn once a run; b is odd

so that a sample is masked in the same way on one rank or on a hundred, in any micro-batch size, and
when activation checkpointing computes it a second time. Keys come from PyTorch's CPU generator,
seeded by SHA-256, on every device: CPU and CUDA mask alike. All elements of a call are hashed
together, by three operators, whatever the number of samples; ``torch.nn.Dropout`` draws from the
device's global stream, whose position depends on everything computed before.

Within a row, and within a column, ``a b + d`` are independent words for independent keys (``d`` by
feature; an odd ``b`` maps ``a`` one to one); squaring keeps the corners of a rectangle from
following each other, and ``c`` shifts each row by a word of its own. ``tests/model`` measures
rates, correlations of rows, columns, samples, steps and modules, and rectangles.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_peft.core.seeds import derive_seed
from dist_peft.quant.low_rank_linear import DropoutKeys

__all__ = ["DropoutPosition", "SampleDropout", "draw_words"]

_WORDS = 2**32


class DropoutPosition:
    """Where the run is: shared by all dropouts of a model, moved before each micro-batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.sample_ids: Sequence[int] = ()
        self._keys: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        """The next forward computes rows ``sample_ids`` [B] of optimizer step ``step``.

        Filler rows (-1) are masked too; nothing depends on how.
        """
        self.step, self.sample_ids = step, sample_ids.tolist()
        self._keys.clear()

    def get_position_keys(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``c`` of the micro-batch, int32 ``[B * positions, 1]``.

        Keys of a position do not depend on how many follow it.
        """
        found = self._keys.get((positions, device))
        if found is None:
            seeds = [derive_seed(self.seed, "dropout", self.step, s) for s in self.sample_ids]
            drawn = torch.cat([draw_words(seed, positions) for seed in seeds]).to(device)
            found = drawn[:, :1].contiguous(), drawn[:, 1:].contiguous()
            self._keys[positions, device] = found
        return found


class SampleDropout(nn.Module):
    """Zeroes elements with probability ``p`` and scales the others by ``1 / (1 - p)``.

    The identity (the same tensor object) in evaluation and where ``p`` is 0.

    Args:
        p: probability, ``0 <= p < 1``.
        path: name of the module it belongs to.
        position: where the run is.
    """

    def __init__(self, p: float, path: str, position: DropoutPosition) -> None:
        super().__init__()
        self.p, self.path, self.position = p, path, position
        self._keys: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, ..., features], or [B * S, features] where a model has flattened its batch."""
        keys = self.make_keys(x)
        if keys is None:
            return x
        kept = self._keep_elements(x, keys)
        dropped: Tensor = _KeepElements.apply(x, kept, keys.probability)
        return dropped

    def drop_rows(self, x: Tensor, tokens: Tensor, count: int) -> Tensor:
        """``forward`` of the tokens' own inputs ``[count, features]``, of which ``x`` has rows
        ``tokens`` [n], in any order and repeated: ``[n, features]``."""
        if self.p == 0 or not self.training:
            return x
        return self.drop_keyed_rows(x, self.find_row_keys(tokens, count))

    def find_row_keys(self, tokens: Tensor, count: int) -> Tensor:
        """Return ``a`` and ``c`` of ``tokens`` [n], of the micro-batch's ``count``: int32
        ``[n, 2]``. All dropouts of a model have the same."""
        a, c = self._find_position_keys(count, tokens.device)
        return torch.cat((a[tokens], c[tokens]), 1)

    def drop_keyed_rows(self, x: Tensor, row_keys: Tensor) -> Tensor:
        """``drop_rows`` of rows ``x`` ``[n, features]`` with the keys of their tokens ``[n, 2]``,
        which may be another rank's."""
        keys = self._join_keys(row_keys[:, :1], row_keys[:, 1:], x)
        dropped: Tensor = _KeepElements.apply(x, self._keep_elements(x, keys), keys.probability)
        return dropped

    def make_keys(self, x: Tensor) -> DropoutKeys | None:
        """Return the keys by which ``forward`` drops elements of ``x``; None where it keeps all."""
        if self.p == 0 or not self.training:
            return None
        features = x.shape[-1] if x.dim() > 1 else 1
        self._check_rows(x.shape[0])
        return self._join_keys(*self._find_position_keys(x.numel() // features, x.device), x)

    def _check_rows(self, rows: int) -> None:
        ids = self.position.sample_ids
        if not ids or rows % len(ids):
            raise RuntimeError(
                f"dropout of {self.path}: {rows} rows but {len(ids)} sample ids; "
                "begin() must be called with the ids of the micro-batch"
            )

    def _find_position_keys(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the keys of all ``count`` positions of the micro-batch."""
        self._check_rows(count)
        return self.position.get_position_keys(count // len(self.position.sample_ids), device)

    def _join_keys(self, a: Tensor, c: Tensor, x: Tensor) -> DropoutKeys:
        features = x.shape[-1] if x.dim() > 1 else 1
        b, d = self._get_feature_keys(features, x.device)
        return DropoutKeys(a, c, b, d, round(self.p * _WORDS) - _WORDS // 2, 1 - self.p)

    @staticmethod
    def _keep_elements(x: Tensor, keys: DropoutKeys) -> Tensor:
        """Return 0 where ``x`` is zeroed and 1 elsewhere, uint8."""
        words = torch.addcmul(keys.d, keys.a, keys.b)
        torch.addcmul(keys.c, words, words, out=words)
        # in place: a CPU compares integers into booleans several times slower
        return words.ge_(keys.threshold).to(torch.uint8).view(x.shape)

    def _get_feature_keys(self, features: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``b`` and ``d``, int32 ``[features]``."""
        found = self._keys.get((features, device))
        if found is None:
            seed = derive_seed(self.position.seed, "dropout", self.path)
            drawn = draw_words(seed, features).to(device)
            found = drawn[:, 0] | 1, drawn[:, 1].contiguous()
            self._keys[features, device] = found
        return found

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _KeepElements(torch.autograd.Function):
    """``x * kept / probability``. On a CPU the product is faster than a masked fill."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.probability = probability
        return (x * kept).div_(probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).div_(ctx.probability), None, None


def draw_words(seed: int, count: int) -> Tensor:
    """Two random words for each of ``count`` places, int32 ``[count, 2]``; a prefix of more."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(count, 2, dtype=torch.int32)
    return words.random_(-_WORDS // 2, _WORDS // 2, generator=generator)
