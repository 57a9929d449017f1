"""A frozen model on fake tensors: shapes and types without memory or arithmetic.

Parameters and buffers become fake tensors of the CPU; packed linears, embeddings and experts return
one of the right shape and do not dequantize (``model.forward_probe``).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.model.expert_variants import make_stand_in
from dist_peft.model.experts import FrozenExperts
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["fake_frozen_forwards", "quiet_fake_tensors", "replace_with_fake_tensors"]

_TORCH_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep PyTorch from printing the traceback of an operator that fails on fake tensors."""
    before = _TORCH_LOG.disabled
    _TORCH_LOG.disabled = True
    try:
        yield
    finally:
        _TORCH_LOG.disabled = before


def replace_with_fake_tensors(model: nn.Module, mode: FakeTensorMode) -> list[Tensor]:
    """Replace parameters and buffers by fake ones on the CPU; tied ones stay tied.

    Returns:
        The fake parameters.
    """
    fakes: dict[int, Tensor] = {}

    def make_fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            with mode:
                fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return fakes[id(tensor)]

    parameters: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = nn.Parameter(make_fake(parameter), False)
                module._parameters[name] = parameters[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make_fake(buffer)
    return list(parameters.values())


def fake_frozen_forwards(
    model: nn.Module, mode: FakeTensorMode, markers: dict[nn.Module, Tensor] | None
) -> None:
    """Let packed modules return fake tensors.

    Args:
        markers: if not None, a number that is added to the output of each linear is stored here.
    """
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            marker = None
            if markers is not None:
                with mode:
                    marker = markers[module] = torch.zeros((), requires_grad=True)
            vars(module)["forward"] = _make_fake_linear(module, marker)
        elif isinstance(module, FrozenEmbedding):
            vars(module)["forward"] = _make_fake_lookup(module)
        elif isinstance(module, FrozenExperts):
            vars(module)["forward"] = make_stand_in(module.form, module.out_features)


def _make_fake_linear(linear: FrozenLinear, marker: Tensor | None) -> Callable[[Tensor], Tensor]:
    def fake_linear_forward(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != linear.in_features:
            raise ValueError(f"a linear of {linear.in_features} columns gets {list(x.shape)}")
        y = x.new_empty(*x.shape[:-1], linear.out_features)
        if marker is None:
            return y
        # a graph with the input and the marker in it
        return y + (x.sum(-1, keepdim=True) + marker.to(x.dtype))

    return fake_linear_forward


def _make_fake_lookup(embedding: FrozenEmbedding) -> Callable[[Tensor], Tensor]:
    def fake_embedding_forward(ids: Tensor) -> Tensor:
        shape = ids.numel(), embedding.embedding_dim
        rows = torch.empty(shape, dtype=embedding.dtype, device=ids.device)
        return embedding.finish_lookup(ids, rows)

    return fake_embedding_forward
