"""Discriminative learning rates: the nearer a layer is to the input, the less it is changed.

Howard & Ruder 2018 (ULMFiT, section 3.2) divide a layer's rate by 2.6 for the layer below; Clark et
al. 2020 (ELECTRA) and the fine-tuning of vision transformers use 0.65 to 0.9. With ``n`` blocks::

    embeddings     decay ** (n + 1)
    block i        decay ** (n - i)        i = 0 ... n - 1
    norm, head     1

These are the factors of timm's ``param_groups_layer_decay``, for an adapter's parameters as for the
weights of a layer, where the last norm goes with the head (BEiT; timm's own vision transformers
count it to the last block).
"""

from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["LayerDecay"]


class LayerDecay:
    """Learning-rate factor by the full name of a parameter, times another factor.

    Args:
        model: the model with its adapter.
        blocks: its layers, first to last.
        decay: factor from a layer to the one below.
        lr_scale: factor of the adapter (LoRA+), by name.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        decay: float,
        lr_scale: Callable[[str], float],
    ) -> None:
        self.decay, self.lr_scale, self.num_blocks = decay, lr_scale, len(blocks)
        numbers = {id(block): number for number, block in enumerate(blocks)}
        self._depths: list[tuple[str, int]] = []
        for path, module in model.named_modules():
            if id(module) in numbers:
                self._depths.append((f"{path}.", numbers[id(module)] + 1))
            elif isinstance(module, nn.Embedding) and not self._find_depth(f"{path}."):
                self._depths.append((f"{path}.", 0))

    def __call__(self, name: str) -> float:
        found = self._find_depth(name)
        depth = self.num_blocks + 1 if found is None else found
        factor: float = self.decay ** (self.num_blocks + 1 - depth)
        return factor * self.lr_scale(name)

    def _find_depth(self, name: str) -> int | None:
        return next((depth for path, depth in self._depths if name.startswith(path)), None)
