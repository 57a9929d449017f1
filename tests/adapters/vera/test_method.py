import pytest
import torch

from dist_peft.adapters.method_table import make_adapter
from dist_peft.adapters.vera.layer import VeraLinear
from dist_peft.core.config.run import VeraConfig
from dist_peft.core.errors import UserError
from tests.support.adapters import adapted, frozen_model, gathered, tiny_llama


def test_layers_share_one_pair_of_the_largest_size() -> None:
    model, adapter = adapted(tiny_llama(), method=VeraConfig, r=4)
    layers = [m for m in model.modules() if isinstance(m, VeraLinear)]
    assert len(layers) == 14 and len({id(layer.projections) for layer in layers}) == 1
    assert layers[0].projections.A.shape == (4, 48) and layers[0].projections.B.shape == (48, 4)
    # the pair, besides the model's own buffers, is counted once
    assert sum(b.shape in [(4, 48), (48, 4)] for b in model.buffers()) == 2
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned == sum(4 + layer.base.out_features for layer in layers)
    public = adapter.to_public_adapter(gathered(model), "tiny/base")
    assert public.config["peft_type"] == "VERA" and public.config["r"] == 4
    assert len(public.tensors) == 2 * 14 + 2


def test_unknown_target_is_refused() -> None:
    adapter = make_adapter(VeraConfig(target_modules=["x"]), seed=0, arithmetic=torch.float32)
    with pytest.raises(UserError, match="matches no linear"):
        adapter.attach_to_model(frozen_model(tiny_llama()))
