"""A traced step; ``test_run_plan`` compares its peaks with real runs."""

from pathlib import Path

import torch
import torch.distributed as dist

from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.plan.planned_model import build_planned_model
from dist_peft.plan.step_trace import trace_step
from tests.support.live_storage import ODD, odd_tree, save_odd_base


def test_a_step_of_one_rank_of_many(tmp_path: Path) -> None:
    planned = build_planned_model(parse_config(odd_tree(save_odd_base(tmp_path / "base"))))
    skeleton, world = planned.skeleton, World(5, 64, 5, 8, "torchrun")
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
    adapters = [p for b in skeleton.blocks[1:3] for p in b.parameters() if p.requires_grad]
    assert trace.kept_gradients == sum(4 * p.numel() for p in adapters)
    padded = sum(
        -(-p.shape[0] // 64) * 64 * p.shape[1:].numel() * p.element_size()
        for p in skeleton.blocks[1].parameters()
    )
    assert trace.gathered_block == 2 * padded
    weights = sum(m.weight.numel() for m in _original_block().modules() if hasattr(m, "weight"))
    assert trace.block_flops > 3 * 2 * weights * 2 * 96
    assert trace.peaks["backward 1"].by_purpose["gathered"] > 0


def _original_block() -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return LlamaDecoderLayer(ODD, 0)
