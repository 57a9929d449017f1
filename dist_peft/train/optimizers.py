"""Optimizers: torch's fused AdamW, and bitsandbytes' 8-bit and paged AdamW.

AdamW (Loshchilov & Hutter 2019). A checkpoint always holds float32 ``exp_avg`` and ``exp_avg_sq``
of the parameter's shape: torch's own are saved as they are, bitsandbytes' 8-bit ones (Dettmers et
al. 2022: blocks of 256 values, dynamic 8-bit codes) are dequantized on save and quantized again on
load. So a checkpoint can be resumed with another number of ranks, or with another optimizer of this
file; 8-bit moments are then rounded once more.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.engine_protocol import OptimizerFactory, init_adam_state, num_updates
from dist_peft.train.exact_adamw import ExactAdamW

__all__ = ["make_optimizer_factory"]

_BLOCK = 256
"""Values of bitsandbytes' 8-bit optimizers that share a scale."""


def make_optimizer_factory(config: TrainConfig, device: torch.device) -> OptimizerFactory:
    """Return the factory for ``train.optimizer``."""
    if config.exact:
        return _ExactAdamWFactory(config)
    if config.optimizer == "adamw":
        return _TorchAdamW(config)
    if config.optimizer.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"train.optimizer {config.optimizer} pages between GPU and host memory and needs a "
            "CUDA device; use adamw or adamw8bit"
        )
    return _BitsAndBytesAdamW(config)


class _TorchAdamW:
    """Fused AdamW; takes DTensors. Moments are allocated at construction, not at the first step."""

    wants_plain = False
    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        c = self.config
        optimizer = torch.optim.AdamW(
            groups, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        for group in groups:
            for p in group["params"]:
                optimizer.state[p] = init_adam_state(p)
        return optimizer

    def read_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor
    ) -> dict[str, Tensor]:
        state = optimizer.state[parameter]
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq")}

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        for key, value in moments.items():
            if optimizer.state[parameter][key] is not value:
                optimizer.state[parameter][key].copy_(value)

    def set_num_steps(
        self, optimizer: torch.optim.Optimizer, step: int, skipped: Collection[int] = ()
    ) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["step"].fill_(num_updates(group, step, skipped))


class _ExactAdamWFactory(_TorchAdamW):
    """``ExactAdamW`` for ``train.exact``; takes plain tensors, as its square roots do."""

    wants_plain = True

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        c = self.config
        optimizer = ExactAdamW(
            groups, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )
        for group in groups:
            for p in group["params"]:
                optimizer.state[p] = init_adam_state(p)
        return optimizer


class _BitsAndBytesAdamW:
    """8-bit and paged AdamW on plain tensors.

    The state of a paged optimizer is paged where a rank's part of a parameter has 1e5 values or
    more; below that bitsandbytes keeps it on the device.

    bitsandbytes keeps tensors below 4096 elements in 32 bits even in its 8-bit optimizers; the type
    of the state distinguishes the two.
    """

    wants_plain = True
    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    _keys = (("exp_avg", "state1", "1"), ("exp_avg_sq", "state2", "2"))

    def __init__(self, config: TrainConfig) -> None:
        try:
            import bitsandbytes
        except ImportError:
            raise UserError(
                f"train.optimizer {config.optimizer} needs bitsandbytes: "
                "pip install 'dist_peft[bnb]', or use adamw"
            ) from None
        self.bnb = bitsandbytes
        self.config = config

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        c = self.config
        kinds = {
            "adamw8bit": self.bnb.optim.AdamW8bit,
            "paged_adamw": self.bnb.optim.PagedAdamW32bit,
            "paged_adamw8bit": self.bnb.optim.PagedAdamW8bit,
        }
        optimizer = kinds[c.optimizer](
            groups, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.numel():
                    optimizer.init_state(group, parameter, group_index, index)
        return optimizer

    def read_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor
    ) -> dict[str, Tensor]:
        if not parameter.numel():  # a rank without rows of this parameter
            return {key: torch.zeros_like(parameter) for key, _, _ in self._keys}
        state = optimizer.state[parameter]
        return {
            key: self._dequantize_state(state, name, number, parameter.device).view_as(parameter)
            for key, name, number in self._keys
        }

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        if not parameter.numel():
            return
        state = optimizer.state[parameter]
        for key, name, number in self._keys:
            value = moments[key].to(parameter.device).reshape(state[name].shape)
            if state[name].dtype == torch.float32:
                state[name].copy_(value)
                continue
            table = state[f"qmap{number}"].to(parameter.device)
            codes, scales = _quantize_blocks(value.flatten(), table)
            state[name].copy_(codes.view_as(value))
            state[f"absmax{number}"].copy_(scales)

    def _dequantize_state(
        self, state: dict[str, Any], name: str, number: str, device: torch.device
    ) -> Tensor:
        codes: Tensor = state[name]
        # Paged state is a CPU tensor over memory that a GPU can read as well. bitsandbytes' kernel
        # of the GPU asks the tensor for its device, so it must get a copy that is there.
        codes = codes.to(device, copy=True)
        if codes.dtype == torch.float32:
            return codes
        return self.bnb.functional.dequantize_blockwise(
            codes,
            absmax=state[f"absmax{number}"].to(device),
            code=state[f"qmap{number}"].to(device),
            blocksize=_BLOCK,
        )

    def set_num_steps(
        self, optimizer: torch.optim.Optimizer, step: int, skipped: Collection[int] = ()
    ) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.numel():
                    optimizer.state[p]["step"] = num_updates(group, step, skipped)


def _quantize_blocks(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize ``values`` [n] to nearest 8-bit codes [n] and one scale per block of 256.

    Dequantized values round-trip bit for bit, unlike with bitsandbytes' ``quantize_blockwise``: the
    signed code reaches from -0.993 to 1 only, so a block whose largest value is negative
    dequantizes to less than its scale and would shrink by 0.7 % with each save and resume. Here the
    scale makes the extreme value the extreme code; neighbouring floats are tried too, since
    dividing rounds.
    """
    blocks = functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.amax(1)
    if code[0] < 0:
        scales = torch.maximum(scales, blocks.amin(1) / code[0])
    middles = (code[1:] + code[:-1]) / 2
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    codes = torch.bucketize(shares, middles)
    decoded = code[codes]
    up, down = scales, scales
    for _ in range(2):
        up, down = up.nextafter(up.new_tensor(torch.inf)), down.nextafter(down.new_zeros(()))
        for near in (up, down):
            exact = (decoded * near[:, None] == blocks).all(1)
            scales = torch.where(exact, near, scales)
    return codes.to(torch.uint8).flatten()[: len(values)], scales
