import torch
from torch import nn

from dist_peft.model.block_kinds import block_kind


def test_blocks_of_a_kind_have_equal_shapes_and_settings() -> None:
    first, second = (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1)) for _ in range(2))
    assert block_kind(first) == block_kind(second)
    second[1].p = 0.2
    assert block_kind(first) != block_kind(second)
    wider = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.1))
    assert block_kind(first) != block_kind(wider)
    assert block_kind(first.to(torch.bfloat16)) != block_kind(nn.Sequential(nn.Linear(3, 4)))
