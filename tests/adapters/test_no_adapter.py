import pytest
import torch

from dist_peft.adapters.no_adapter import NoAdapter
from tests.support.adapters import frozen_model, tiny_llama


def test_changes_nothing() -> None:
    model, adapter = frozen_model(tiny_llama()), NoAdapter()
    before = [name for name, _ in model.named_modules()]
    adapter.attach(model)
    adapter.begin(0, torch.tensor([0]))
    adapter.start_from({})
    assert [name for name, _ in model.named_modules()] == before
    assert adapter.start_state() == ()
    assert adapter.lr_scale("x.lora_B") == 1.0
    with pytest.raises(RuntimeError, match="nothing to save"):
        adapter.to_public({}, "base")
