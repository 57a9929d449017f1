"""Blocks called alone compute what the model computes; stages are told from the tensors."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_peft.compress.calibration import capture_block_inputs, find_linear_stages, record_inputs
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.quant.codec import RawCodec
from dist_peft.store.reader import RowReader
from tests.support.tiny_models import CONFIGS, save_model

CPU = torch.device("cpu")
IDS = torch.arange(4, 28).view(1, 24)


def loaded(family: str, directory: Path) -> Skeleton:
    save_model(CONFIGS[family], directory)
    base = BaseConfig(path=str(directory), compute_dtype="float32")
    skeleton = build_skeleton(base, directory)
    engine = SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "gpt_neox", "opt"])
def test_blocks_alone_give_the_inputs_of_the_next(family: str, tmp_path: Path) -> None:
    skeleton = loaded(family, tmp_path)
    sample = capture_block_inputs(skeleton.model, skeleton.blocks, IDS)
    with torch.no_grad(), record_inputs(skeleton.blocks[1]) as expected:
        skeleton.model(input_ids=IDS, use_cache=False)
        assert torch.equal(sample.run_block(skeleton.blocks[0], 0), expected[0])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("phi", [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]]),
    ],
)
def test_stages(family: str, expected: list[list[str]], tmp_path: Path) -> None:
    skeleton = loaded(family, tmp_path)
    block = skeleton.blocks[0]
    sample = capture_block_inputs(skeleton.model, skeleton.blocks, IDS)
    stages = find_linear_stages(block, lambda: sample.run_block(block, 0))
    names = {id(m): name.rpartition(".")[2] for name, m in block.named_modules()}
    assert [[names[id(linear)] for linear in stage] for stage in stages] == expected


def test_what_samples_share_is_kept_once(tmp_path: Path) -> None:
    skeleton = loaded("gemma3", tmp_path)
    first = capture_block_inputs(skeleton.model, skeleton.blocks, IDS)
    second = capture_block_inputs(skeleton.model, skeleton.blocks, IDS.flip(1), first)
    angles = [s.block_inputs[0][1]["position_embeddings"][0] for s in (first, second)]
    assert angles[0] is angles[1]
    assert not torch.equal(first.hidden, second.hidden)


class Odd(nn.Module):
    def __init__(self, calls: int, idle: bool) -> None:
        super().__init__()
        self.calls = calls
        raw = RawCodec(torch.float32)
        self.linear = FrozenLinear(4, 4, raw, False, torch.float32, "odd.weight", "cpu")
        self.block = nn.Identity()
        self.idle = idle

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = torch.zeros(1, 4)
        for _ in range(self.calls):
            hidden = self.block(hidden)
        return hidden if self.idle else self.linear(hidden)


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = Odd(calls=2, idle=True)
    with pytest.raises(UserError, match="Odd does not call its blocks one after the other"):
        capture_block_inputs(model, [model.block], IDS)
    with pytest.raises(UserError, match=r"calibration never reached odd\.weight"):
        find_linear_stages(model, lambda: model(IDS, False))
