"""Dropout whose mask depends on the sample, not on a stream of random numbers.

The mask of one row of the batch is drawn from a generator seeded by

    sha256(run seed, module path, optimizer step, global index of the sample)

so that a sample is masked in the same way on one rank or on a hundred, in any micro-batch size, and
when activation checkpointing computes it a second time. ``torch.nn.Dropout`` draws from the
device's global stream, whose position depends on everything computed before.

On another kind of device (CPU, CUDA) the same seed gives other masks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_peft.core.seeds import derive_seed

__all__ = ["DropoutPosition", "SampleDropout"]


class DropoutPosition:
    """Where the run is: shared by all dropouts of a model, moved before each micro-batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.sample_ids: Sequence[int] = ()
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        """The next forward computes rows ``sample_ids`` [B] of optimizer step ``step``.

        Filler rows (-1) are masked too; nothing depends on how.
        """
        self.step, self.sample_ids = step, sample_ids.tolist()

    def make_generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device]


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

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, ...], or [B * S, ...] where a model has flattened its batch."""
        if self.p == 0 or not self.training:
            return x
        return x.masked_fill(self._drop_elements(x), 0.0) / (1 - self.p)

    def _drop_elements(self, x: Tensor) -> Tensor:
        """True where ``x`` is zeroed; one draw per sample."""
        ids = self.position.sample_ids
        if not ids or x.shape[0] % len(ids):
            raise RuntimeError(
                f"dropout of {self.path}: {x.shape[0]} rows but {len(ids)} sample ids; "
                "begin() must be called with the ids of the micro-batch"
            )
        mask = torch.empty(len(ids), x.numel() // len(ids), dtype=torch.bool, device=x.device)
        generator = self.position.make_generator(x.device)
        for row, sample in zip(mask, ids, strict=True):
            generator.manual_seed(
                derive_seed(self.position.seed, self.path, self.position.step, sample)
            )
            row.bernoulli_(self.p, generator=generator)
        return mask.view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"
