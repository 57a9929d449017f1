"""A traced step; ``test_run_plan`` compares its peaks with real runs."""

from pathlib import Path

import torch
import torch.distributed as dist

from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.engine.shard_placement import choose_shard_placement
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.step_trace import trace_step
from tests.support.live_storage import ODD, odd_tree, save_odd_base


def test_a_step_of_one_rank_of_many(tmp_path: Path) -> None:
    planned = build_planned_model(parse_config(odd_tree(save_odd_base(tmp_path / "base"))))
    skeleton, world = planned.skeleton, World(5, 40, 5, 8, "torchrun")
    before = {name: p.shape for name, p in skeleton.model.named_parameters()}
    trace = trace_step(
        skeleton,
        planned.adapter,
        planned.config,
        world,
        blocks=[1, 2],
        device_type="cuda",
        micro_batches=2,
    )
    assert not dist.is_initialized()
    assert {name: p.shape for name, p in skeleton.model.named_parameters()} == before
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert skeleton.model_config.num_hidden_layers == len(skeleton.blocks) == 4
    hidden = 2 * 96 * ODD.hidden_size * torch.bfloat16.itemsize
    assert trace.input_bytes == hidden
    placed = [(choose_shard_placement(p, 40), p) for p in skeleton.blocks[1].parameters()]
    assert {p.dimension for p, _ in placed} == {0, 1}  # five rows of A: along its columns
    shares = [p.count_padded_elements() * one.element_size() for p, one in placed]
    assert trace.gathered_block == 40 * sum(shares)
    learns = [one.requires_grad for _, one in placed]
    # two blocks; FSDP2's share of all gradients of a block is one tensor, padded
    own = 2 * sum(share for share, wanted in zip(shares, learns, strict=True) if wanted)
    assert trace.kept_gradients == trace.reduced_gradients == own
    # two blocks in flight: one whole, the buffer of the other
    for phase in ("forward 0", "forward 1", "backward 0", "backward 1"):
        assert 0 < trace.peaks[phase].by_purpose["gathered"] < 2.1 * 40 * sum(shares), phase
    weights = sum(m.weight.numel() for m in _original_block().modules() if hasattr(m, "weight"))
    assert trace.block_flops > 3 * 2 * weights * 2 * 96


def _original_block() -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return LlamaDecoderLayer(ODD, 0)
