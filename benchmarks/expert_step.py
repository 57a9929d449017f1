"""CPU time of a training step on mixtures of experts: experts dequantized together and one by one.

    python benchmarks/expert_step.py [--repeats 9] [--mixtures tiny middle wide]
        [--lora attention experts]

Both sides are the same model (NF4, LoRA of rank 8 on attention or on experts, activation
checkpointing) and the same tokens in one process, and take turns; seconds are the process's own.
``one by one`` is the loop that this program had before: a count of every expert read on the host,
then each of them with tokens dequantized and multiplied alone, or with LoRA on experts the factors
of each of them multiplied by autograd nodes of its own. Losses are compared for equality.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import print_table, run_config, write_result
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dist_peft.adapters.lora import expert_layer
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.model import experts as experts_module
from dist_peft.quant.codec import Codec
from dist_peft.quant.frozen_matmul import matmul_fp32_accumulate
from dist_peft.quant.grouped_matmul import RowGroups
from dist_peft.quant.trainable_products import apply_low_rank
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")
MIXTURES = {
    "tiny": (64, 32, 32, 4, 128),
    "middle": (256, 128, 64, 8, 512),
    "wide": (512, 1024, 8, 2, 512),
}
"""Hidden size, an expert's inner size, experts, experts of a token, tokens."""


TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "experts": ["experts"],
}
"""What has LoRA."""


class _OneByOne(torch.autograd.Function):
    """The product before: an expert at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, codec: Codec, in_features: int, counts: list[int]
    ) -> Tensor:
        ctx.packed, ctx.codec, ctx.in_features, ctx.counts = packed, codec, in_features, counts
        y = x.new_empty(x.shape[0], packed.shape[0] // len(counts))
        for part, weight in iterate_experts(packed, codec, in_features, counts, x.dtype):
            y[part] = matmul_fp32_accumulate(functional.linear, x[part], weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        result = grad.new_empty(grad.shape[0], ctx.in_features)
        operands = (ctx.packed, ctx.codec, ctx.in_features, ctx.counts, grad.dtype)
        for part, weight in iterate_experts(*operands):
            result[part] = matmul_fp32_accumulate(torch.matmul, grad[part], weight)
        return result, None, None, None, None


def iterate_experts(
    packed: Tensor, codec: Codec, in_features: int, counts: list[int], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    out, first = packed.shape[0] // len(counts), 0
    for index, count in enumerate(counts):
        if count:
            rows = packed.detach()[index * out : (index + 1) * out]
            weight = codec.dequantize_rows(rows, in_features, dtype)
            yield slice(first, first + count), weight
        first += count


def multiply_one_by_one(
    x: Tensor, packed: Tensor, codec: Codec, in_features: int, groups: RowGroups
) -> Tensor:
    result: Tensor = _OneByOne.apply(x, packed, codec, in_features, list(groups.counts))
    return result


def change_one_by_one(
    x: Tensor, A: Tensor, B: Tensor, groups: RowGroups, scaling: float, dtype: torch.dtype
) -> Tensor:
    experts = len(groups.counts)
    factors = (
        A.view(experts, -1, A.shape[1]).unbind(0),
        B.view(B.shape[0], -1, experts).unbind(2),
    )
    parts = zip(x.split(list(groups.counts)), *factors, strict=True)
    return torch.cat([apply_low_rank(*own, scaling, dtype) for own in parts if len(own[0])])


@contextmanager
def use_product(side: str, lora: str) -> Iterator[None]:
    own = experts_module.frozen_grouped_matmul, expert_layer.apply_grouped_low_rank
    if side == "one by one" and lora == "attention":
        experts_module.frozen_grouped_matmul = multiply_one_by_one
    elif side == "one by one":
        expert_layer.apply_grouped_low_rank = change_one_by_one
    yield
    experts_module.frozen_grouped_matmul, expert_layer.apply_grouped_low_rank = own


def make_mixture(directory: Path, hidden: int, inner: int, experts: int, chosen: int) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        moe_intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=experts,
        num_experts_per_tok=chosen,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def measure_mixture(name: str, dtype: str, lora: str, repeats: int) -> dict[str, Any]:
    """Return seconds of each side's steps, and their losses."""
    *sizes, tokens = MIXTURES[name]
    with tempfile.TemporaryDirectory() as scratch:
        make_mixture(Path(scratch), *sizes)
        config = run_config(
            Path(scratch),
            base={"compute_dtype": dtype},
            adapter={"r": 8, "target_modules": TARGETS[lora]},
        )
        built = load_weights(build_model(resolve_config(config)), World(), CPU)
    call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
    objective = TokenObjective()
    torch.manual_seed(1)
    ids = torch.randint(0, 512, (1, tokens))
    places = torch.arange(tokens)[None]
    batch = Batch(ids, ids.roll(-1, 1), places, torch.zeros(1, dtype=torch.long))
    seconds: dict[str, list[float]] = {"together": [], "one by one": []}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 2):
        for side, found in seconds.items():
            with use_product(side, lora):
                begin = time.process_time()
                built.setup.adapter.begin_micro_batch(0, batch.sample_ids)
                loss = objective.compute_loss(built.model, batch, CPU, call) / 1000
                built.engine.backward(loss, last=True)
                built.engine.step(0.0, 1.0)
                if repeat > 1:
                    found.append(time.process_time() - begin)
                losses[side] = float(loss.detach())
    assert losses["together"] == losses["one by one"], losses
    return {"cpu_s": seconds, "loss": losses["together"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--lora", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, result = [], {}
    for lora in args.lora:
        for name in args.mixtures:
            for dtype in ("float32", "bfloat16"):
                found = measure_mixture(name, dtype, lora, args.repeats)
                result[f"{name} {dtype}, LoRA on {lora}"] = found
                middle = {side: statistics.median(s) for side, s in found["cpu_s"].items()}
                milliseconds = [1000 * seconds for seconds in middle.values()]
                ratio = milliseconds[1] / milliseconds[0]
                rows.append([name, dtype, lora, *milliseconds, f"{ratio:.2f}"])
    print_table(["mixture", "type", "LoRA on", "together: CPU ms", "one by one", "ratio"], rows)
    write_result("expert_step", result)


if __name__ == "__main__":
    main()
