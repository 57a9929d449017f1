"""The adapter method ``lora``: LoRA, rsLoRA, DoRA, LoRA+, PiSSA and LoftQ on any base.

LoRA+ (Hayou, Ghosh, Yu 2024): ``B`` learns ``lr_ratio`` times faster than ``A``; magnitudes and
embeddings learn at the plain rate. rsLoRA (Kalajdzievski 2023): ``s = alpha / sqrt(r)``.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.base import (
    PublicAdapter,
    check_patterns,
    match_targets,
    pattern_value,
)
from dist_peft.adapters.dropout import DropoutPosition, RowDropout
from dist_peft.adapters.lora import LoraEmbedding, LoraLinear, LoraSpec
from dist_peft.adapters.peft_format import public_lora
from dist_peft.core.config import LoraConfig
from dist_peft.core.errors import UserError
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["LoraAdapter"]


class LoraAdapter:
    """See the module docstring and ``adapters.base.Adapter``."""

    def __init__(self, config: LoraConfig, *, seed: int, arithmetic: torch.dtype) -> None:
        self.config, self.seed, self.arithmetic = config, seed, arithmetic
        self.position = DropoutPosition(seed)
        self.layers: dict[str, LoraLinear | LoraEmbedding] = {}
        self._all_names: list[str] = []

    # -- building ------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Wrap the targets. See ``Adapter``.

        Raises:
            UserError: targets or patterns match nothing; settings that exclude each other.
        """
        config = self.config
        names = match_targets(config.target_modules, model)
        if config.embeddings:
            names.append(_input_embedding(model))
        check_patterns("rank_pattern", config.rank_pattern, names)
        check_patterns("alpha_pattern", config.alpha_pattern, names)
        self._all_names = [name for name, _ in model.named_modules()]
        self.layers = {name: self._layer(name, model.get_submodule(name)) for name in names}
        for name, layer in self.layers.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)

    def _layer(self, name: str, module: nn.Module) -> LoraLinear | LoraEmbedding:
        config = self.config
        r = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.alpha)
        spec = LoraSpec(
            r=r,
            scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
            arithmetic=self.arithmetic,
            seed=self.seed,
            dora=config.use_dora,
            start=config.init,
            iterations=config.init_iterations,
        )
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, name, spec)
        assert isinstance(module, FrozenLinear)
        if config.init == "loftq" and module.codec.name == "raw":
            raise UserError(
                f"adapter.init loftq fits what quantization loses, but {name} is not quantized; "
                "set base.quant, take the module out of adapter.target_modules, or use another "
                "adapter.init"
            )
        most = min(module.in_features, module.out_features)
        if config.init != "default" and r > most:
            raise UserError(
                f"adapter.init {config.init} needs a rank of at most {most} in {name} "
                f"[{module.out_features}, {module.in_features}], not {r}; lower adapter.r or "
                "adapter.rank_pattern"
            )
        return LoraLinear(module, name, spec, RowDropout(config.dropout, name, self.position))

    # -- training ------------------------------------------------------------------------------

    def begin(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin(step, sample_ids)

    def lr_scale(self, name: str) -> float:
        return self.config.lr_ratio if name.endswith(".lora_B") else 1.0

    def start_state(self) -> tuple[str, ...]:
        return tuple(
            f"{path}.{name}"
            for path, layer in self.layers.items()
            if isinstance(layer, LoraLinear)
            for name in layer.start_names
        )

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Give back start factors. See ``Adapter``.

        Raises:
            UserError: a factor is absent or has another shape.
        """
        for path, layer in self.layers.items():
            if not isinstance(layer, LoraLinear) or not layer.start_names:
                continue
            for name in layer.start_names:
                value = tensors.get(f"{path}.{name}")
                if value is None or tuple(value.shape) != layer.shapes[name]:
                    found = "is absent" if value is None else f"has shape {list(value.shape)}"
                    raise UserError(
                        f"checkpoint: {path}.{name} {found}, not {list(layer.shapes[name])}; it "
                        "was written with another adapter.init, adapter.r or target: resume with "
                        "the configuration it was written with"
                    )
            layer.give_start({name: tensors[f"{path}.{name}"] for name in layer.start_names})

    # -- saving --------------------------------------------------------------------------------

    def to_public(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """PEFT's form. See ``Adapter`` and ``peft_format``."""
        whole: dict[str, dict[str, Tensor]] = {}
        for path, layer in self.layers.items():
            whole[path] = {}
            for name, shape in layer.shapes.items():
                if name == "base_norm2":
                    continue
                value = tensors.get(f"{path}.{name}")
                if value is None or tuple(value.shape) != shape or value.numel() == 0:
                    found = "is absent" if value is None else f"has shape {list(value.shape)}"
                    raise RuntimeError(
                        f"adapter tensor {path}.{name} {found}, expected {list(shape)}: "
                        "the parameters were not gathered"
                    )
                whole[path][name] = value
        return public_lora(self.config, whole, self._target_names(), base)

    def _target_names(self) -> list[str]:
        """The shortest list that means the same modules: last components, else whole names."""
        last = sorted({name.rpartition(".")[2] for name in self.layers})
        meant = [name for name in self._all_names if name.rpartition(".")[2] in last]
        return last if set(meant) == set(self.layers) else sorted(self.layers)


def _input_embedding(model: nn.Module) -> str:
    """Name of the input embedding of a ``transformers`` model."""
    embedding = cast(Callable[[], nn.Module], model.get_input_embeddings)()
    if not isinstance(embedding, nn.Embedding):
        raise UserError(
            f"adapter.embeddings: the input embedding is a {type(embedding).__name__}, which "
            "cannot be adapted; set it to false"
        )
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(embedding)]
