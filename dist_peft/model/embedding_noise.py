"""NEFTune (Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024).

In training, and only there, the embedding of a token gets noise::

    x' = x + alpha / sqrt(L d) u        u uniform in [-1, 1), L tokens of the document, d width

``L`` is that of the document, without padding and without its neighbours in a packed sequence. The
noise of feature ``j`` of the token at position ``i`` is a hash, as in ``model.sample_dropout``::

    u = ((a b + c)^2 + e) / 2^31        int32, modulo 2^32

    a, e   by (run seed, step, tokens of the document, i)
    b, c   by (run seed, j); b is odd

so that it does not depend on the number of ranks, on micro-batches, on packing, or on how often an
embedding is computed. Two equal documents in one step have the same noise. Virtual tokens have
none: they are parameters and no embeddings of tokens.
"""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.seeds import derive_seed
from dist_peft.model.sample_dropout import draw_words

__all__ = ["EmbeddingNoise"]


class EmbeddingNoise:
    """Adds noise to the output of the input embedding, in training steps.

    Args:
        model: of ``transformers``.
        alpha: size of the noise; above 0.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None
        self._feature_keys: dict[tuple[int, torch.device], Tensor] = {}
        embedding = cast(Any, model).get_input_embeddings()
        self._hook = embedding.register_forward_hook(self._add_noise)

    @classmethod
    def from_config(cls, model: nn.Module, train: TrainConfig) -> Self | None:
        """Return the noise of a run; None if it has none."""
        return cls(model, train.neftune_alpha, train.seed) if train.neftune_alpha else None

    def begin_micro_batch(self, step: int, input_ids: Tensor, lengths: Tensor) -> None:
        """The forward passes until ``end_micro_batch`` compute ``input_ids`` in step ``step``.

        Args:
            input_ids: long [B, S].
            lengths: long [B, S], tokens of the document at each position, 0 at padding; documents
                are consecutive.
        """
        keys = torch.zeros(*input_ids.shape, 2, dtype=torch.int32)
        for row, (tokens, sizes) in enumerate(zip(input_ids, lengths.tolist(), strict=True)):
            start = 0
            while start < len(sizes) and sizes[start]:
                stop = start + sizes[start]
                content = tokens[start:stop].tolist()
                seed = derive_seed(self._seed, "neftune", step, *content)
                keys[row, start:stop] = draw_words(seed, stop - start)
                start = stop
        self._batch = input_ids, keys, lengths

    def end_micro_batch(self) -> None:
        """Add nothing from now on."""
        self._batch = None

    def _add_noise(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._batch is None:
            return output
        input_ids, keys, lengths = self._batch
        if output.shape[:2] != input_ids.shape:
            raise RuntimeError(
                f"train.neftune_alpha: embeddings of shape {list(output.shape)} for tokens of "
                f"shape {list(input_ids.shape)}"
            )
        return output + self.compute_noise(keys, lengths, output.shape[-1], output.device).to(
            output.dtype
        )

    def compute_noise(
        self, keys: Tensor, lengths: Tensor, width: int, device: torch.device
    ) -> Tensor:
        """Return the noise of positions with ``keys`` [B, S, 2], float32 ``[B, S, width]``."""
        found = self._feature_keys.get((width, device))
        if found is None:
            found = draw_words(derive_seed(self._seed, "neftune"), width)
            found[:, 0] |= 1
            found = self._feature_keys[width, device] = found.to(device)
        keys = keys.to(device)
        words = torch.addcmul(found[:, 1], keys[..., :1], found[:, 0])
        torch.addcmul(keys[..., 1:], words, words, out=words)
        sizes = lengths.to(device).float()
        scale = torch.where(sizes > 0, self._alpha / (sizes.clamp_min(1) * width).sqrt(), 0.0)
        return words.float().mul_(2.0**-31).mul_(scale[..., None])

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()
