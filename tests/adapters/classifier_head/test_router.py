"""Trained routers against those of ``transformers``, with their loss."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.gpt_oss import modeling_gpt_oss

from dist_peft.adapters.classifier_head.router import RouterAdapter, RouterPart
from dist_peft.adapters.method_table import assemble_adapter
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.data.loader import Batch
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader
from dist_peft.train.router_objective import RouterObjective
from tests.support.packed_floats import GPT_OSS
from tests.support.tiny_models import CONFIGS, MIXTURES, save_model

CPU = torch.device("cpu")


def attach(directory: Path, **adapter: object) -> tuple[torch.nn.Module, RouterAdapter]:
    targets = {"target_modules": ["q_proj"], "r": 2, "train_router": True}
    config = parse_config(
        {
            "base": {"path": str(directory), "quant": None, "compute_dtype": "float32"},
            "adapter": {"kind": "lora", **targets, **adapter},
            "data": {"train": ["unused.jsonl"]},
        }
    )
    skeleton = build_skeleton(config.base, directory)
    made = assemble_adapter(config, skeleton)
    made.attach_to_model(skeleton.model)
    assert isinstance(made, RouterAdapter)
    engine = SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton.model, made


def make_batch() -> tuple[Batch, torch.Tensor]:
    """Two documents of 9 and 6 tokens, the second one padded; with the mask of ``transformers``."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    labels = torch.where(mask.roll(-1, 1) > 0, ids.roll(-1, 1), -100)
    labels[0, 8] = labels[1, 5:] = -100
    places = torch.arange(9).repeat(2, 1)
    places[1, 6:] = torch.arange(3)
    return Batch(ids, labels, places, torch.arange(2), is_packed=False), mask


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_loss_and_gradients_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Cross entropy and auxiliary loss, and the gradient of each router."""
    config = MIXTURES[family]
    config.router_aux_loss_coef = 0.3
    save_model(config, tmp_path)
    model, adapter = attach(tmp_path)
    original = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    batch, mask = make_batch()
    targets = (batch.labels != -100).sum()
    mine = RouterObjective().compute_loss(model, batch, CPU, model) / targets
    mine.backward()
    labels = torch.where(mask > 0, batch.input_ids, -100)
    theirs = original(
        input_ids=batch.input_ids, attention_mask=mask, labels=labels, output_router_logits=True
    )
    theirs.loss.backward()
    assert 0.3 * theirs.aux_loss > 0.2  # counts in the sum
    torch.testing.assert_close(mine.detach(), theirs.loss.detach(), rtol=1e-6, atol=0)
    assert len(adapter.parts) == (1 if family == "qwen3_moe" else 2)
    for path, part in adapter.parts.items():
        wanted = original.get_submodule(path).weight.grad
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(part.weight.grad, wanted, rtol=1e-4, atol=1e-6)


def test_public_form_has_the_routers(tmp_path: Path) -> None:
    save_model(MIXTURES["mixtral"], tmp_path)
    model, adapter = attach(tmp_path, router_aux_loss=0)
    assert adapter.get_lr_scale("model.layers.0.mlp.gate.weight") == 1.0
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    public = adapter.to_public_adapter(tensors, "base")
    assert public.head is not None and public.head.labels == ()
    name = "model.layers.1.mlp.gate.weight"
    assert torch.equal(public.head.tensors[name], tensors[name])
    assert not any("gate.weight" in key for key in public.tensors)
    part = model.get_submodule("model.layers.0.mlp.gate")
    assert isinstance(part, RouterPart) and part.top_k == 2 and part.loss.weight == 0
    with pytest.raises(AttributeError, match="no_such"):
        _ = part.no_such
    with pytest.raises(RuntimeError, match="is not in the base's files"):
        part.init_rows("weight", Span(0, 1))


def test_models_without_routers_or_their_loss_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(CONFIGS["llama"], tmp_path / "dense")
    with pytest.raises(UserError, match="no router that is known"):
        attach(tmp_path / "dense")
    save_model(GPT_OSS, tmp_path / "gpt_oss")
    with monkeypatch.context() as patch:
        patch.delattr(modeling_gpt_oss, "load_balancing_loss_func")
        with pytest.raises(UserError, match="no load-balancing loss for GptOssForCausalLM"):
            attach(tmp_path / "gpt_oss", router_aux_loss=0.1)
    model, _ = attach(tmp_path / "gpt_oss", router_aux_loss=0)
    parts = [m for m in model.modules() if isinstance(m, RouterPart)]
    assert parts and set(parts[0].shapes) == {"weight", "bias"}
