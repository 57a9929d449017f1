import pytest
import torch

from dist_peft.adapters.no_adapter import NoAdapter
from tests.support.adapters import frozen_model, tiny_llama


def test_changes_nothing() -> None:
    model, adapter = frozen_model(tiny_llama()), NoAdapter()
    before = [name for name, _ in model.named_modules()]
    adapter.attach_to_model(model)
    adapter.begin_micro_batch(0, torch.tensor([0]))
    adapter.set_init_factors({})
    assert [name for name, _ in model.named_modules()] == before
    assert adapter.list_init_factors() == ()
    assert adapter.get_lr_scale("x.lora_B") == 1.0
    with pytest.raises(RuntimeError, match="nothing to save"):
        adapter.to_public_adapter({}, "base")
