"""Estimate of a step of Llama 3.1 8B on one H100, from counted launches and bytes. A projection.

    python benchmarks/h100_estimate.py

One block, and the head with its loss, run on ``meta`` tensors at full size: a micro-batch of 2048
tokens in bfloat16, NF4 with double quantization, LoRA of rank 16 on all linears, activation
checkpointing. Each operator that would launch is counted with the bytes that it reads and writes
and its floating point operations; views and allocations are free. Cases: the decode of bitsandbytes
and composed linears, the fused decode, everything fused (docs/kernels.md), dropout or none.

The rates below are assumed, not measured. The time of an operator is the longest of its operations,
its bytes and the shortest kernel. Device and host, which launches, work at the same time, so that a
step takes the longer of the two. Every byte is counted at the rate of memory, none at that of the
cache. Attention stands for a flash kernel of packed documents: one launch forward, three backward.
The launches of bitsandbytes' decode are counted in a real one on the CPU. Optimizer, data, and all
that several GPUs send are left out.
"""

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import print_table, write_result
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from dist_peft.adapters.lora import layer as lora_layer
from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.adapters.lora.siblings import link_siblings
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant import low_rank_linear
from dist_peft.quant.assumed_device import assume_device
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.shared_decodes import make_sharing_contexts
from dist_peft.train.head_loss import compute_frozen_head_losses

SHAPE = Path(__file__).parent.parent / "configs" / "bases" / "llama-3.1-8b.json"
TOKENS, DOCUMENT = 2048, 512
RANK = 16
PRODUCT_RATE, ATTENTION_RATE, BANDWIDTH = 600e12, 350e12, 2.7e12
SHORTEST_KERNEL, LAUNCH = 2e-6, 7e-6
"""Operations and bytes a second that are reached, seconds of the shortest kernel on the device, and
seconds of the host for a launch with the Python and autograd around it: assumptions."""

PEERS = {"surogate": 9400, "Unsloth": 8200}
"""Tokens a second of an 8B on an H100, as published by others."""


class Case(NamedTuple):
    """Who decodes; whether linears are fused with LoRA; dropout; whether linears of one input share
    its products, and recomputation and backward a decode (``engine.share_decodes``)."""

    decode: str
    fused: bool
    dropout: float = 0.0
    siblings: bool = False
    shares_decodes: bool = False


CASES = {
    "bnb, composed": Case("bnb", False),
    "fused decode, composed": Case("fused", False),
    "fused, apart": Case("fused", True),
    "fused": Case("fused", True, siblings=True),
    "fused, shared decodes": Case("fused", True, siblings=True, shares_decodes=True),
    "bnb, composed, dropout": Case("bnb", False, 0.05),
    "fused, dropout": Case("fused", True, 0.05, siblings=True),
    "fused, dropout, shared decodes": Case("fused", True, 0.05, True, True),
}

DTYPE = torch.bfloat16
FREE = (
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "slice",
    "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "as_strided",
    "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "_reshape_alias",
)  # fmt: skip
"""Operators that launch nothing."""


@dataclass
class Work:
    """Launches, bytes, floating point operations and seconds of the device."""

    launches: float = 0
    moved: float = 0
    flops: float = 0
    seconds: float = 0

    def add(
        self, launches: float, moved: float, flops: float = 0, rate: float = PRODUCT_RATE
    ) -> None:
        self.launches += launches
        self.moved += moved
        self.flops += flops
        self.seconds += max(moved / BANDWIDTH, flops / rate, launches * SHORTEST_KERNEL)


@dataclass
class Counts:
    """Work by kind."""

    kinds: dict[str, Work] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> Work:
        return self.kinds.setdefault(kind, Work())


def count_bytes(tree: Any) -> int:
    """Bytes of the tensors of a tree; an expanded one counts what it shows."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class CountedOperators(TorchDispatchMode):
    """Adds each operator to the counts; a product of the base's size is another kind than those of
    rank ``RANK``."""

    def __init__(self, counts: Counts, other: str = "elementwise") -> None:
        super().__init__()
        self.counts, self.other = counts, other

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in FREE:
            return result
        flops, packet = 0, func.overloadpacket
        packet = torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        kind = self.other
        if flops:
            small = any(
                RANK in t.shape for t in (*tree_leaves(args), result) if isinstance(t, Tensor)
            )
            kind = "LoRA" if small else "products"
        self.counts[kind].add(1, count_bytes((args, kwargs)) + count_bytes(result), flops)
        return result


class FusedKernels:
    """Results of ``quant.device_low_rank`` without their numbers."""

    def __init__(self, mode: CountedOperators) -> None:
        self.mode = mode

    def project_rows(
        self, x: Tensor, factor: Tensor, scaling: float, keys: Any = None, out: Any = None
    ) -> Tensor:
        inner = x.new_empty(x.shape[0], factor.shape[0]) if out is None else out
        self._add(x, factor, inner, flops=2 * x.numel() * factor.shape[0])
        return inner

    def expand_rows(self, y: Tensor, inner: Tensor, factor: Tensor, keys: Any = None) -> Tensor:
        self._add(y, y, inner, factor, flops=2 * y.numel() * inner.shape[1])
        return y

    def sum_outer(self, inner: Tensor, x: Tensor, gradient: Tensor, keys: Any = None) -> None:
        self._add(inner, x, gradient, flops=2 * x.numel() * inner.shape[1])

    def _add(self, *tensors: Tensor, flops: int) -> None:
        self.mode.counts["LoRA"].add(1, count_bytes(tensors), flops)


class Attention(torch.autograd.Function):
    """A flash kernel of packed documents, without its numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mode: CountedOperators) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mode = mode
        # two products over the lower half of each document's square
        ctx.flops = 2 * q.shape[1] * TOKENS * DOCUMENT * q.shape[-1]
        mode.counts["attention"].add(1, count_bytes((q, k, v, q)), ctx.flops, ATTENTION_RATE)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        moved = count_bytes(saved) * 2 + 3 * count_bytes(grads)
        ctx.mode.counts["attention"].add(3, moved, 2.5 * ctx.flops, ATTENTION_RATE)
        return *(torch.empty_like(tensor) for tensor in saved), None


def count_decode(by: str, weights: tuple[int, int] = (1024, 4096)) -> tuple[float, float]:
    """Launches, and bytes a weight, of a decode of NF4 to bfloat16."""
    codec = Nf4Codec(64)
    if by == "fused":
        return 1, codec.num_row_bytes(weights[1]) / weights[1] + DTYPE.itemsize
    counts = Counts()
    packed = codec.quantize_to_packed(torch.zeros(weights))
    with mock.patch.dict(os.environ, DIST_PEFT_KERNELS=by):
        codec.dequantize_rows(packed[:1], weights[1], DTYPE)  # imports, tables
        with CountedOperators(counts):
            codec.dequantize_rows(packed, weights[1], DTYPE)
    work = counts["elementwise"]
    return work.launches, work.moved / (weights[0] * weights[1])


def build_block(config: LlamaConfig, dropout: float, siblings: bool) -> nn.Module:
    """A block on ``meta`` with NF4 linears and LoRA."""
    position = DropoutPosition(0)
    position.begin_micro_batch(0, torch.tensor([0]))
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).to(DTYPE).requires_grad_(False).train()
    spec = LoraSpec(r=RANK, scaling=2.0, arithmetic=DTYPE, seed=0)
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            frozen = FrozenLinear(
                linear.in_features, linear.out_features, Nf4Codec(64), False, DTYPE, name, "meta"
            )
            adapted = LoraLinear(frozen, name, spec, SampleDropout(dropout, name, position))
            adapted.train()
            block.set_submodule(name, adapted)
    if siblings:
        link_siblings({n: m for n, m in block.named_modules() if isinstance(m, LoraLinear)})
    return block


def count_block(config: LlamaConfig, case: Case) -> Counts:
    """Forward, recomputation and backward of one block."""
    counts = Counts()
    mode = CountedOperators(counts)
    launches, moved = count_decode(case.decode)

    def dequantize(codec: Any, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        weight = packed.new_empty(packed.shape[0], in_features, dtype=dtype)
        counts["decode"].add(launches, moved * weight.numel())
        return weight

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return Attention.apply(q, k, v, mode).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("counted", attend)
    config._attn_implementation = "counted"
    block = build_block(config, case.dropout, case.siblings)
    options = {"context_fn": make_sharing_contexts} if case.shares_decodes else {}
    hidden = torch.empty(1, TOKENS, config.hidden_size, dtype=DTYPE, device="meta")
    with torch.device("meta"):
        angles = LlamaRotaryEmbedding(config)(hidden, torch.arange(TOKENS)[None])
    kernels = FusedKernels(mode)
    with (
        mock.patch.object(Nf4Codec, "dequantize_rows", dequantize),
        mock.patch.object(lora_layer, "can_fuse_low_rank", return_value=case.fused),
        mock.patch.object(low_rank_linear, "_import_kernels", return_value=kernels),
        assume_device(torch.device("cuda")),
    ):

        def run(recorded: bool) -> None:
            x = hidden.clone().requires_grad_()
            with mode if recorded else nullcontext():
                y = checkpoint(
                    block, x, position_embeddings=angles, use_reentrant=False,
                    preserve_rng_state=False, **options,
                )  # fmt: skip
                y.backward(torch.empty_like(y))

        run(recorded=False)  # keys of dropout, drawn once
        counts.kinds.clear()
        for parameter in block.parameters():
            parameter.grad = None
        run(recorded=True)
    return counts


def count_head(config: LlamaConfig) -> Counts:
    """The frozen head, its losses and the gradient of the hidden states."""
    counts = Counts()
    head = FrozenLinear(
        config.hidden_size, config.vocab_size, RawCodec(DTYPE), False, DTYPE, "head", "meta"
    )
    shape = (TOKENS, config.hidden_size)
    hidden = torch.empty(shape, dtype=DTYPE, device="meta").requires_grad_()
    targets = torch.zeros(TOKENS, dtype=torch.int64, device="meta")
    with CountedOperators(counts, other="loss"):
        losses = compute_frozen_head_losses(hidden, targets, head)
        losses.backward(torch.empty_like(losses))
    return counts


def estimate(config: LlamaConfig, case: Case) -> dict[str, Any]:
    """Sum a micro-batch: all blocks, and the head."""
    block, head = count_block(config, case), count_head(config)
    kinds: dict[str, Work] = {}
    for counts, times in ((block, config.num_hidden_layers), (head, 1)):
        for kind, work in counts.kinds.items():
            total = kinds.setdefault(kind, Work())
            total.launches += times * work.launches
            total.moved += times * work.moved
            total.flops += times * work.flops
            total.seconds += times * work.seconds
    device = sum(work.seconds for work in kinds.values())
    launches = sum(work.launches for work in kinds.values())
    host = launches * LAUNCH
    return {
        "kinds": {kind: vars(work) for kind, work in kinds.items()},
        "launches": launches,
        "device_ms": 1e3 * device,
        "host_ms": 1e3 * host,
        "tokens_a_second": TOKENS / max(device, host),
    }


def main() -> None:
    config = LlamaConfig(**json.loads(SHAPE.read_text()))
    found = {name: estimate(config, case) for name, case in CASES.items()}
    kinds = list(dict.fromkeys(kind for case in found.values() for kind in case["kinds"]))
    rows: list[list[object]] = []
    for kind in kinds:
        for name, unit, scale in (
            ("launches", "", 1),
            ("moved", "GB", 1e9),
            ("seconds", "ms", 1e-3),
        ):
            cells = [case["kinds"].get(kind, vars(Work()))[name] / scale for case in found.values()]
            rows.append([f"{kind}, {unit or name}", *(float(cell) for cell in cells)])
    for key in ("launches", "device_ms", "host_ms", "tokens_a_second"):
        rows.append([f"all, {key}", *(float(case[key]) for case in found.values())])
    print("a projection at assumed rates, nothing was measured on a GPU")
    print_table(["micro-batch of 2048 tokens", *found], rows)
    print("published by others, tokens/s on an H100:", PEERS)
    write_result("h100_estimate", {"cases": found, "peers": PEERS})


if __name__ == "__main__":
    main()
