from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from dist_peft.adapters.bottleneck.block_structure import (
    find_adapter_sites,
    is_norm_module,
    read_hidden_size,
)
from dist_peft.core.errors import UserError
from tests.support.adapters import disturb, frozen_model
from tests.support.bottlenecks import adapted, family
from tests.support.tiny_models import CONFIGS, ENCODERS

SANDWICH = ("gemma2", "gemma3")
PARALLEL = ("phi", "gpt_neox")
SITES = {"attention.output": "attention_adapters", "output": "output_adapters"}
IDS = torch.tensor([[4, 7, 9, 11, 5]])


def found(config: tf.PretrainedConfig, placement: Any) -> list[tuple[str, list[Any]]]:
    return list(find_adapter_sites(frozen_model(family(config)), placement))


@pytest.mark.parametrize("name", CONFIGS)
def test_places(name: str) -> None:
    mlp = "fc2" if name == "opt" else "mlp"
    attention = "attention" if name == "gpt_neox" else "self_attn"
    for path, sites in (both := found(CONFIGS[name], "houlsby")):
        assert path.rpartition(".")[0].endswith("layers")
        described = [(site.name, site.output, site.reads) for site in sites]
        assert described == [
            ("attention_adapters", attention, "output"),
            ("output_adapters", mlp, "output"),
        ]
    assert [path[-1] for path, _ in both] == ["0", "1"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_adapters_get_the_residual_stream(name: str, placement: str) -> None:
    """As long as adapters change nothing: x + f is the block's output, x what came before."""
    if name in SANDWICH and placement == "pfeiffer":
        return
    model, adapter = adapted(family(CONFIGS[name]), placement=placement, init="mam_adapter")
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        block = path.rpartition(".")[0]

        def note(module: nn.Module, args: Any, result: Any, block: str = block) -> None:
            inputs[f"{block}.f"], inputs[f"{block}.x"] = args

        def keep(module: nn.Module, args: Any, result: Any, block: str = block) -> None:
            outputs[block] = result[0] if isinstance(result, tuple) else result
            inputs[f"{block}.in"] = args[0]

        layer.register_forward_hook(note)
        model.get_submodule(block).register_forward_hook(keep)
    model(input_ids=IDS)
    for block, output in outputs.items():
        f, x, came_in = (inputs[f"{block}.{what}"] for what in ("f", "x", "in"))
        if name in PARALLEL:
            reads = {"pfeiffer": "output", "parallel": "stream"}[placement]
            assert adapter.layers[f"{block}.output_adapters"].spec.reads == reads
            assert x is None if placement == "pfeiffer" else torch.equal(x, came_in)
        elif name in SANDWICH:
            assert torch.equal(x + model.get_submodule(block).post_feedforward_layernorm(f), output)
        else:
            torch.testing.assert_close((x + f).view_as(output), output)


@pytest.mark.parametrize("name", SANDWICH)
def test_a_norm_in_between_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"layers\.0 has a norm between the two; use houlsby or"):
        found(CONFIGS[name], "pfeiffer")


def test_sequential_gpt_neox() -> None:
    changes = {**CONFIGS["gpt_neox"].to_dict(), "use_parallel_residual": False}
    config = tf.GPTNeoXConfig(**changes)
    assert [s.reads for _, sites in found(config, "pfeiffer") for s in sites] == ["sum", "sum"]


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
def test_post_norm_blocks(name: str, placement: str) -> None:
    """Each adapter reads what its placement says, and changes what the norm is given."""
    torch.manual_seed(0)
    original = tf.AutoModelForSequenceClassification.from_config(ENCODERS[name]).eval()
    model, adapter = adapted(original, placement=placement, reduction_factor=4)
    disturb(model)
    parts = ["attention.output", "output"] if placement == "houlsby" else ["output"]
    assert list(adapter.layers) == [
        f"{name}.encoder.layer.{i}.{part}.{SITES[part]}" for i in (0, 1) for part in parts
    ]
    for path, layer in adapter.layers.items():
        part = model.get_submodule(path.rpartition(".")[0])
        seen: dict[str, Any] = {}
        part.register_forward_hook(lambda m, args, out, seen=seen: seen.update(io=(args, out)))
        model(input_ids=IDS)
        (y, x), out = seen["io"]
        hooks, part.dense._forward_hooks = part.dense._forward_hooks, OrderedDict()
        f = part.dense(y)
        part.dense._forward_hooks = hooks
        h = {"pfeiffer": part.LayerNorm(x + f), "houlsby": f, "parallel": x}[placement]
        torch.testing.assert_close(out, part.LayerNorm(f + layer.compute_residual(h) + x))


def test_post_norm_blocks_with_learning_norms() -> None:
    torch.manual_seed(0)
    original = tf.AutoModelForSequenceClassification.from_config(ENCODERS["bert"]).eval()
    model, adapter = adapted(original, train_layernorm=True, init="mam_adapter")
    assert "bert.encoder.layer.1.attention.output.LayerNorm" in adapter.norms
    with torch.no_grad():
        found, expected = model(input_ids=IDS).logits, original(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)


def test_modernbert() -> None:
    """As in AdapterHub's library, adapters are given the normed stream for ``x``."""
    torch.manual_seed(0)
    original = tf.AutoModelForSequenceClassification.from_config(ENCODERS["modernbert"]).eval()
    model, adapter = adapted(original, reduction_factor=4)
    disturb(model)
    layer, block = adapter.layers["model.layers.1.output_adapters"], model.model.layers[1]
    seen: dict[str, Any] = {}
    block.mlp_norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0], normed=out))
    block.register_forward_hook(lambda m, args, out: seen.update(out=out))
    model(input_ids=IDS)
    with torch.no_grad():
        f = original.model.layers[1].mlp(seen["normed"])
        expected = seen["x"] + f + layer.compute_residual(seen["normed"] + f)
    torch.testing.assert_close(seen["out"], expected)


def test_unknown_blocks_are_refused() -> None:
    post_norm = tf.OPTConfig(**{**CONFIGS["opt"].to_dict(), "do_layer_norm_before": False})
    with pytest.raises(UserError, match=r"does not know blocks like.*after the sublayers; use"):
        found(post_norm, "houlsby")
    model = frozen_model(family(CONFIGS["llama"]))
    del model.model.layers[0].input_layernorm
    with pytest.raises(UserError, match=r"\.0: attention \['self_attn'\], MLP \['mlp'\], norms"):
        list(find_adapter_sites(model, "houlsby"))
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="no decoder blocks with linears of 64 outputs"):
        list(find_adapter_sites(model, "houlsby"))


def test_norms_are_those_of_the_stream() -> None:
    model = family(CONFIGS["qwen3"])
    names = {n for n, m in model.named_modules() if is_norm_module(m, read_hidden_size(model))}
    assert names == {
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    }
