"""Models name the engine's device and the base's type, whatever their first parameter is."""

from pathlib import Path

import pytest
import torch
import transformers as tf

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, LoraConfig, QuantConfig
from dist_peft.engine.single import SingleEngine
from dist_peft.model.skeleton import build_skeleton
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONFIGS, TOWER_FIRST, save_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", TOWER_FIRST)
def test_code_that_asks_for_the_device_of_a_model_whose_tower_is_not_loaded(
    family: str, tmp_path: Path
) -> None:
    """Their code moves embeddings to ``self.device``."""
    original = save_model(TOWER_FIRST[family], tmp_path, auto=tf.AutoModelForImageTextToText)
    loaded = load(tmp_path)
    assert next(loaded.model.parameters()).is_meta
    models = [m for m in loaded.model.modules() if isinstance(m, tf.PreTrainedModel)]
    assert len(models) > 2 and {m.device for m in models} == {CPU}
    assert torch.equal(logits(loaded.model, input_ids=IDS), logits(original, input_ids=IDS))


def test_the_type_is_that_of_the_base_and_not_of_its_adapters(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    quant = QuantConfig(embeddings=True)
    base = BaseConfig(path=str(tmp_path), quant=quant, compute_dtype="bfloat16")
    skeleton = build_skeleton(base, tmp_path)
    model = skeleton.model
    LoraAdapter(LoraConfig(), seed=0, arithmetic=torch.float32).attach_to_model(model)
    SingleEngine(CPU).shard_model(model, skeleton.blocks)
    floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
    assert floating[0] == torch.float32
    assert model.dtype == model.model.dtype == torch.bfloat16
    assert model.device == CPU
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
