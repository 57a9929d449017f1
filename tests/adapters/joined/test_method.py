import pytest
import torch

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import LoraConfig
from tests.support.adapters import frozen_model, tiny_llama


def test_sequences_are_shared_evenly() -> None:
    adapters = [LoraAdapter(LoraConfig(), seed=0, arithmetic=torch.float32) for _ in range(2)]
    joined = JoinedAdapter(adapters)
    joined.attach_to_model(frozen_model(tiny_llama()))
    joined.begin_micro_batch(3, torch.arange(4))
    assert [list(adapter.position.sample_ids) for adapter in adapters] == [[0, 1], [2, 3]]
    assert joined.shares.list_parts(torch.zeros(4, 2, 1), "q") == [(0, 2), (1, 2)]
    with pytest.raises(RuntimeError, match="saved by itself"):
        joined.to_public_adapter({}, "base")
