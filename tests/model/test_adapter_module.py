"""The loader finds adapter layers of every method by one pair of protocols."""

import torch

from dist_peft.adapters.ia3.layer import Ia3Linear
from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import LoraConfig
from dist_peft.model.adapter_module import AdapterModule, InitializesFromBase
from tests.support.adapters import frozen_model, tiny_llama


def test_lora_initializes_from_the_base_and_wraps_it() -> None:
    model = frozen_model(tiny_llama())
    linears = dict(model.named_modules())
    LoraAdapter(LoraConfig(r=2), seed=0, arithmetic=torch.float32).attach_to_model(model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, AdapterModule)}
    assert len(found) == 14
    for name, layer in found.items():
        assert isinstance(layer, InitializesFromBase) and isinstance(layer, LoraLinear)
        assert layer.base is linears[name]
        assert not isinstance(layer.base, AdapterModule)


def test_a_rescaling_does_not_see_the_rows_of_the_base() -> None:
    layer = Ia3Linear(
        frozen_model(tiny_llama()).model.layers[0].mlp.up_proj, "up_proj", rescales_input=False
    )
    assert isinstance(layer, AdapterModule) and not isinstance(layer, InitializesFromBase)
