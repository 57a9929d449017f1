"""Recomputation changes what is kept, and nothing else."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import ResolvedConfig
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.engine.activation_checkpointing import checkpoint_block_activations
from dist_peft.plan.storage_tracker import StorageTracker
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.train.objective import TokenObjective
from tests.support.live_storage import odd_tree, save_odd_base
from tests.support.loaded_models import CPU

WIDTH, ROWS = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.down(torch.tanh(self.up(x)))


def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(3))


def run(blocks: nn.ModuleList) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes of activations that autograd keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in blocks.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h: Any = x
        for block in blocks:
            h = block(h, scale=0.5)
        loss = h.sum()
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in blocks.named_parameters() if p.grad is not None}
    return {"x": x.grad, **gradients}, held


def test_gradients_are_equal_and_less_is_kept() -> None:
    plain, recomputing = model(), model()
    checkpoint_block_activations(list(recomputing))
    expected, kept = run(plain)
    found, kept_less = run(recomputing)
    assert found.keys() == expected.keys() and len(found) == 13
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept >= 3 * ROWS * (WIDTH + 64) * 4  # each block's input and its tanh
    assert kept_less <= 3 * ROWS * WIDTH * 4  # each block's input
    assert [block.calls for block in plain] == [1, 1, 1]
    assert [block.calls for block in recomputing] == [2, 2, 2]


def test_names_and_hooks_stay() -> None:
    """Hooks are outside of what is recomputed: they run once a forward."""
    blocks = model()
    names = [name for name, _ in blocks.named_parameters()]
    seen: list[str] = []
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    checkpoint_block_activations(list(blocks))
    blocks[0].register_forward_hook(lambda module, args, output: seen.append("after"))
    run(blocks)
    assert seen == ["before", "after"]
    assert [name for name, _ in blocks.named_parameters()] == names


class CountedOperators(TorchDispatchMode):
    """Calls of attention's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attentions += "attention_for_cpu.default" in str(func)
        return func(*args, **(kwargs or {}))


class Counts(NamedTuple):
    attentions: int
    decodes: int
    kept: int  # bytes at the end of forward


def train_micro_batch(
    built: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, list[Tensor], Counts]:
    """Loss, gradients and counts of a packed micro-batch of a LoRA on NF4."""
    monkeypatch.setenv("DIST_PEFT_KERNELS", "torch")
    decode, calls = Nf4Codec.dequantize_rows, []
    codec = Nf4Codec(64)
    decode(codec, codec.quantize_to_packed(torch.ones(1, 64)), 64, torch.bfloat16)  # makes tables

    def count_and_decode(*args: Any) -> Tensor:
        calls.append(1)
        return decode(*args)

    monkeypatch.setattr(Nf4Codec, "dequantize_rows", count_and_decode)
    model, ids = built.model, torch.arange(2 * 48).view(2, 48) % 97
    built.setup.adapter.begin_micro_batch(0, torch.arange(2))
    positions = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)
    batch = Batch(ids, ids, positions, torch.arange(2), is_packed=True)
    tracker, counted = StorageTracker(), CountedOperators()
    with tracker, counted:
        loss = TokenObjective().compute_loss(model, batch, CPU, model)
        kept = tracker.total
        loss.backward()
    monkeypatch.undo()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), gradients, Counts(counted.attentions, len(calls), kept)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd_base(tmp_path_factory.mktemp("kept") / "base")


WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "attention": {"keep_results": "attention"},
    "products": {"keep_results": "products"},
    "shared": {"share_decodes": True},
    "attention, shared": {"keep_results": "attention", "share_decodes": True},
}


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_kept_results_change_counts_and_no_bit(
    base: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for way, engine in WAYS.items():
        tree = odd_tree(base, engine=engine)
        tree["adapter"]["use_dora"] = adapter == "dora"
        config = parse_config(tree)
        setup = build_model(ResolvedConfig(config, Path(config.base.path)))
        built = load_weights(setup, World(), CPU)
        rows = torch.Generator().manual_seed(3)
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=rows) * 0.1
        found[way] = train_micro_batch(built, monkeypatch)
    loss, gradients, plain = found["none"]
    for way, (other, others, counts) in found.items():
        assert other == loss and len(others) == len(gradients) > 10
        assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))
        # 2 documents in each of 2 sequences and 4 blocks, twice without keeping
        assert counts.attentions == (2 * 16 if way in ("none", "shared") else 16)
        if "shared" in way:
            same = found["attention" if "attention" in way else "none"][2]
            assert counts.kept == same.kept and counts.decodes < same.decodes
    if adapter == "lora":
        blocks, linears = 4, 7
        # forward, backward, and recomputation but for each block's last linear; the first block's
        # input needs no gradient, so that three backward passes decode nothing
        assert plain.decodes == blocks * (3 * linears - 1) - 3
        assert found["attention"][2].decodes == plain.decodes
        assert found["products"][2].decodes == blocks * 2 * linears - 3
        # backward decodes the last linears alone, before which recomputation stops
        assert found["shared"][2].decodes == blocks * 2 * linears
        assert found["attention, shared"][2].decodes == blocks * 2 * linears
        tokens, wide = 2 * 48, 120 + 2 * 40 + 120 + 2 * 200  # q, k, v, o, gate, up
        attended = blocks * tokens * (120 * 2 + 6 * 4 + linears * 5 * 2)
        more = found["attention"][2].kept - plain.kept
        assert more == attended
        assert found["products"][2].kept - plain.kept == attended + blocks * tokens * wide * 2
