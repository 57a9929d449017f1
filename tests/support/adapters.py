"""A tiny Llama with frozen linears, filled in one process as a run fills its shards."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import LoraConfig, LowRankConfig, QuantConfig
from dist_peft.core.span import Span, row_span
from dist_peft.model.adapter_module import AdapterModule, InitializesFromBase
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import Codec, make_codec
from tests.support.thread_ranks import run_ranks

RAW = make_codec(None, torch.float32)


def int_codec(bits: int = 4) -> Codec:
    return make_codec(QuantConfig(kind="int", bits=bits, group_size=16), torch.float32)


def tiny_llama(tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    return model


def freeze(linear: nn.Linear, codec: Codec = RAW) -> FrozenLinear:
    """The same linear, frozen and packed."""
    frozen = FrozenLinear(
        linear.in_features,
        linear.out_features,
        codec,
        bias=linear.bias is not None,
        bias_dtype=torch.float32,
        source="",
        device="cpu",
    )
    frozen.packed.data = codec.quantize_to_packed(linear.weight.data)
    if frozen.bias is not None:
        frozen.bias.data = linear.bias.data.clone()
    return frozen


def frozen_model(model: LlamaForCausalLM, codec: Codec = RAW) -> LlamaForCausalLM:
    """A copy with frozen linears; a tied head stays as it is."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        tied = name == "lm_head" and model.config.tie_word_embeddings
        if isinstance(module, nn.Linear) and not tied:
            frozen = freeze(module, RAW if name == "lm_head" else codec)
            frozen.is_head = name == "lm_head"
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, frozen)
    return model.requires_grad_(False).eval()


def adapter_modules(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterModule)}


def fill(model: nn.Module, original: nn.Module, ranks: int = 1) -> None:
    """Load as a run does: each rank prepares its rows, then gives its rows of each parameter."""
    weights = dict(original.named_parameters())
    for path, module in adapter_modules(model).items():
        pieces: dict[str, list[Tensor]] = {}
        weight = weights[f"{path}.weight"].detach()
        template = copy.deepcopy(module)

        def load(
            rank: int,
            reduce: Callable[[Tensor], Tensor],
            template: Any = template,
            weight: Tensor = weight,
        ) -> dict[str, Tensor]:
            own = copy.deepcopy(template) if ranks > 1 else template
            result = {}
            if isinstance(own, InitializesFromBase):
                span = row_span(weight.shape[0], ranks, rank)
                rows = own.prepare_base_rows(weight[span.slice], span, reduce)
                result["base.packed"] = own.base.codec.quantize_to_packed(rows)
            for name, shape in own.shapes.items():
                result[name] = own.init_rows(name, row_span(shape[0], ranks, rank))
            return result

        for result in run_ranks(ranks, load):
            for name, rows in result.items():
                pieces.setdefault(name, []).append(rows)
        for name, parts in pieces.items():
            owner = module.base if name == "base.packed" else module
            own_name = name.removeprefix("base.")
            trains = getattr(owner, own_name).requires_grad
            setattr(owner, own_name, nn.Parameter(torch.cat(parts), requires_grad=trains))


def adapted(
    original: LlamaForCausalLM,
    codec: Codec = RAW,
    seed: int = 3,
    ranks: int = 1,
    method: type[LowRankConfig] = LoraConfig,
    **settings: Any,
) -> tuple[LlamaForCausalLM, Adapter]:
    """A frozen copy of ``original`` with a filled adapter."""
    model = frozen_model(original, codec)
    adapter = make_adapter(method(**settings), seed=seed, arithmetic=torch.float32)
    adapter.attach_to_model(model)
    fill(model, original, ranks)
    return model, adapter


def disturb(model: nn.Module, size: float = 0.1) -> None:
    """Stand for training: move every trainable parameter."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += size * noise


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": getattr(module, name).detach()
        for path, module in adapter_modules(model).items()
        for name in module.shapes
    }


def save(model: nn.Module, adapter: Adapter, directory: Path) -> Path:
    write_adapter_directory(
        directory, adapter.to_public_adapter(gathered(model), "tiny/base"), {"base": "tiny/base"}
    )
    return directory


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 67, (batch, length), generator=torch.Generator().manual_seed(5))


def whole(tensor: Tensor) -> Span:
    return Span(0, tensor.shape[0])


class AdditiveChange:
    """A merger that adds given rows to weights, by name."""

    def __init__(self, changes: dict[str, Tensor]) -> None:
        self.changes = changes

    def changes_weight(self, weight: str) -> bool:
        return weight in self.changes

    def check_weight_shapes(self, shapes: object) -> None:
        pass

    def merge_weight_rows(self, weight: str, rows: Tensor, span: Span, in_base: str) -> Tensor:
        return rows.float() + self.compute_delta_rows(weight, span)

    def depends_on_base(self, weight: str) -> bool:
        return False

    def compute_delta_rows(self, weight: str, span: Span) -> Tensor:
        return self.changes[weight][span.slice]
