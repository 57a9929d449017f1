"""Shared by engines once each rank has plain local tensors: optimizer groups, moments, steps."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from dist_peft.core.trainable_steps import TrainableSteps
from dist_peft.engine.engine_protocol import (
    OptimizerFactory,
    build_lr_groups,
    train_always,
    trainable_parameters,
)

__all__ = ["LocalOptimizer"]


class LocalOptimizer:
    """An optimizer over a model's trainable parameters.

    Args:
        model: its trainable parameters are taken by name, once, after sharding.
        factory: builds the optimizer.
        lr_scale: learning-rate factor by parameter name (LoRA+).
        local: returns the plain tensor of a sharded parameter (identity for plain ones).
        wrap: turns a plain local tensor shaped like the shard back into the engine's kind of
            tensor (a DTensor), given the parameter it belongs to.
        total: sums a scalar over the ranks that share the parameters.
        measure_norm: returns the 2-norm over all ranks of this rank's parts of the gradients, in
            place of one whose last bits depend on their number.
        trainable_steps: see ``Engine.setup_optimizer``. Parameters without a gradient are left
            alone by torch's and bitsandbytes' optimizers anyway; only a resume has to know.
    """

    def __init__(
        self,
        model: nn.Module,
        factory: OptimizerFactory,
        lr_scale: Callable[[str], float],
        local: Callable[[Tensor], Tensor],
        wrap: Callable[[Tensor, Tensor], Tensor],
        total: Callable[[Tensor], Tensor],
        trainable_steps: Callable[[str], TrainableSteps] = train_always,
        measure_norm: Callable[[list[Tensor]], float] | None = None,
    ) -> None:
        self.factory = factory
        self._measure_norm = measure_norm or self._compute_global_norm
        self.local, self.wrap, self.total = local, wrap, total
        self.parameters = trainable_parameters(model)
        self.updated: dict[str, nn.Parameter] = dict(self.parameters)
        if factory.wants_plain:
            self.updated = {n: nn.Parameter(local(p.detach())) for n, p in self.parameters.items()}
        self.optimizer = factory.build_optimizer(
            build_lr_groups(self.updated, lr_scale, trainable_steps)
        )

    def step(self, lr: float, max_norm: float) -> float:
        """Scale gradients to ``max_norm`` (0: as they are) and update. See ``Engine.step``."""
        grads = [self.local(p.grad) for p in self.parameters.values() if p.grad is not None]
        norm = self._measure_norm(grads)
        if math.isfinite(norm):
            if 0 < max_norm < norm:
                torch._foreach_mul_(grads, max_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self._bind_plain_tensors()
            if self.factory.wants_plain:
                for name, parameter in self.parameters.items():
                    grad = parameter.grad
                    self.updated[name].grad = None if grad is None else self.local(grad)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def _bind_plain_tensors(self) -> None:
        """Point the plain parameters at the memory in which the shards are now.

        A shard's memory may move between any two calls: at the first forward FSDP2 pads uneven
        shards into new memory, and with offload it replaces each shard by a pinned copy. An
        optimizer that holds the old memory would update values that are never read again. The
        plain parameters stay the same objects, since optimizer state is found by them.
        """
        if not self.factory.wants_plain:
            return
        for name, parameter in self.parameters.items():
            shard = self.local(parameter.detach())
            # bitsandbytes copies a non-contiguous tensor, and updates the copy
            assert shard.is_contiguous(), f"{name}: strides {shard.stride()}"
            self.updated[name].data = shard

    def _compute_global_norm(self, grads: list[Tensor]) -> float:
        """2-norm over all ranks; squares are added in double precision."""
        if not grads:
            return 0.0
        squares = torch.stack(torch._foreach_norm(grads)).double().square()
        return math.sqrt(float(self.total(squares.sum())))

    def training_state_dict(self) -> dict[str, Tensor]:
        self._bind_plain_tensors()
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state[f"param/{name}"] = parameter.detach()
            moments = self.factory.read_moments(self.optimizer, self.updated[name])
            for key, value in moments.items():
                plain = self.factory.wants_plain
                state[f"{key}/{name}"] = self.wrap(value, parameter) if plain else value
        return state

    def get_moment(self, name: str, key: str) -> Tensor:
        """Return this rank's part of a moment, of the engine's kind of tensor."""
        value = self.factory.read_moments(self.optimizer, self.updated[name])[key]
        return self.wrap(value, self.parameters[name]) if self.factory.wants_plain else value

    @torch.no_grad()
    def load_training_state_dict(
        self, state: Mapping[str, Tensor], step: int, skipped: Collection[int] = ()
    ) -> None:
        self._bind_plain_tensors()
        plain = self.factory.wants_plain
        for name, parameter in self.parameters.items():
            mine, value = self.local(parameter), self.local(state[f"param/{name}"])
            if value.data_ptr() != mine.data_ptr():
                mine.copy_(value)
            moments = {
                key: state.get(f"{key}/{name}", torch.zeros_like(parameter))
                for key in self.factory.moment_names
            }
            if plain:
                moments = {key: self.local(value) for key, value in moments.items()}
            self.factory.write_moments(self.optimizer, self.updated[name], moments)
        self.factory.set_num_steps(self.optimizer, step, skipped)
