"""torch.compile of a block on a CPU: graph breaks, operators, seconds, equality.

    python benchmarks/compile_block.py

A Llama block with random weights in NF4 and LoRA of rank 16 on all linears, as a run builds it
(composed linears, activation checkpointing outside of what is compiled), bfloat16, one thread. For
each size the block runs eager and compiled by ``aot_eager`` (the graphs, run by torch's operators)
and ``inductor`` (generated C++), in turn; the least CPU seconds of forward and backward count.
Compiling is counted apart. Graph breaks and their reasons are those of ``torch._dynamo.explain``
(reasons are kept for some of them only); operators are those that torch's profiler sees in a
forward and backward pass and that launch something on a GPU, a generated kernel being one.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DIST_PEFT_KERNELS", "torch")

import torch
from common import print_table, write_result
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.nf4 import Nf4Codec

SIZES = {"tiny": (64, 128, 4, 64), "mid": (512, 1792, 8, 256)}
"""Width, inner width, heads, tokens."""
BACKENDS = ("aot_eager", "inductor")
ROUNDS = 5
DTYPE = torch.bfloat16
FREE = (
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "slice",
    "select", "unsqueeze", "squeeze", "split", "as_strided", "empty", "empty_like", "new_empty",
    "new_empty_strided", "empty_strided", "_reshape_alias", "result_type", "resize_", "set_",
)  # fmt: skip
"""Operators that launch nothing."""


def build_block(width: int, inner: int, heads: int, dropout: float = 0.0) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(config, 0).to(DTYPE).requires_grad_(False)
    position, codec = DropoutPosition(0), Nf4Codec(64)
    position.begin_micro_batch(0, torch.tensor([0]))
    spec = LoraSpec(r=16, scaling=2.0, arithmetic=DTYPE, seed=0)
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            shape = (linear.in_features, linear.out_features)
            frozen = FrozenLinear(*shape, codec, False, DTYPE, name, "cpu")
            frozen.packed.data = codec.quantize_to_packed(linear.weight.float())
            adapted = LoraLinear(
                frozen, name, spec, SampleDropout(dropout, name, position), device="cpu"
            )
            for factor in (adapted.lora_A, adapted.lora_B):
                factor.data = torch.randn_like(factor) * 0.02
            block.set_submodule(name, adapted)
    return block.train(), LlamaRotaryEmbedding(config)


def count_operators(call: Callable[..., Any], *args: Any) -> int:
    """Operators of a forward and backward pass that launch something, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(call, *args)
    return sum(
        event.name.startswith(("aten::", "cpp_fused"))
        and not event.cpu_children
        and event.name.removeprefix("aten::") not in FREE
        for event in profile.events()
    )


def describe_break(reason: Any) -> str:
    """Return the explanation of a graph break, and the function in which it is."""
    lines = [line.strip() for line in str(reason.reason).split("\n")]
    said = next((line for line in lines if line.startswith("Explanation:")), lines[0])
    if not reason.user_stack:
        return said
    place = reason.user_stack[-1]
    return f"{said.removeprefix('Explanation: ')} ({Path(place.filename).name}: {place.name})"


def run(call: Callable[..., Any], block: nn.Module, x: Tensor, angles: Any) -> list[Tensor]:
    """Return output and gradients."""
    own = x.clone().requires_grad_()
    for parameter in block.parameters():
        parameter.grad = None
    y = call(own, position_embeddings=angles)
    y = y[0] if isinstance(y, tuple) else y
    y.float().square().sum().backward()
    assert own.grad is not None
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    return [y.detach(), own.grad, *gradients]


def time_run(call: Callable[..., Any], *args: Any) -> tuple[float, list[Tensor]]:
    before = time.process_time()
    results = run(call, *args)
    return time.process_time() - before, results


def measure(width: int, inner: int, heads: int, tokens: int) -> dict[str, Any]:
    block, rotary = build_block(width, inner, heads)
    x = torch.randn(1, tokens, width).to(DTYPE)
    angles = rotary(x, torch.arange(tokens)[None])
    args = (block, x, angles)
    explained = torch._dynamo.explain(block)(x.clone().requires_grad_(), position_embeddings=angles)
    reasons = Counter(describe_break(reason) for reason in explained.break_reasons)
    torch._dynamo.reset()
    calls: dict[str, Callable[..., Any]] = {"eager": block}
    compile_seconds = {}
    for backend in BACKENDS:
        calls[backend] = torch.compile(block, backend=backend, dynamic=False)
        compile_seconds[backend] = sum(time_run(calls[backend], *args)[0] for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, list[Tensor]] = {}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            spent, found[name] = time_run(call, *args)
            seconds[name].append(spent)
    counts = {name: count_operators(call, *args) for name, call in calls.items()}
    return {
        "graphs": explained.graph_count,
        "breaks": explained.graph_break_count,
        "reasons": reasons,
        "seconds": {name: min(each) for name, each in seconds.items()},
        "compile_seconds": compile_seconds,
        "operators": counts,
        "equal_bits": {
            name: all(map(torch.equal, found[name], found["eager"])) for name in BACKENDS
        },
        "difference": {
            name: max(
                float((a - b).float().norm() / b.float().norm())
                for a, b in zip(found[name], found["eager"], strict=True)
            )
            for name in BACKENDS
        },
    }


def main() -> None:
    torch.set_num_threads(1)
    inductor_config.cpp.enable_kernel_profile = True
    records = {name: measure(*size) for name, size in SIZES.items()}
    rows = []
    for size, found in records.items():
        for name in ("eager", *BACKENDS):
            rows.append(
                [
                    f"{size}, {name}",
                    f"{1e3 * found['seconds'][name]:.1f}",
                    f"{found['compile_seconds'].get(name, 0.0):.1f}",
                    str(found["operators"][name]),
                    "" if name == "eager" else str(found["equal_bits"][name]),
                    "" if name == "eager" else f"{found['difference'][name]:.1e}",
                ]
            )
        print(size, "graphs:", found["graphs"], "breaks:", found["breaks"])
        print(*(f"  {n} x {reason}" for reason, n in found["reasons"].items()), sep="\n")
    print_table(["block", "CPU ms", "compile s", "operators", "same bits", "difference"], rows)
    write_result("compile_block", {"sizes": SIZES, "blocks": records})


if __name__ == "__main__":
    main()
