import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_peft.adapters.bottleneck.layer import BottleneckLayer
from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.core.errors import UserError
from tests.support.adapters import disturb, ids, tiny_llama
from tests.support.bottlenecks import adapted, family, fill, gathered
from tests.support.tiny_models import CONFIGS

PLACEMENTS = ("pfeiffer", "houlsby", "parallel")


@torch.no_grad()
def slow(model: Any, layers: dict[str, BottleneckLayer], placement: str, tokens: Tensor) -> Tensor:
    """Logits of a Llama, block by block, as the formulas say."""
    size = tokens.shape[1]
    mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
    x = model.model.embed_tokens(tokens)
    rotary = model.model.rotary_emb(x, torch.arange(size)[None])

    def adapter(path: str, h: Tensor) -> Tensor:
        own = layers[path]
        act = torch.nn.functional.silu if placement == "houlsby" else torch.relu
        inner = act(h @ own.down_weight.T + own.down_bias)
        return own.spec.scaling * (inner @ own.up_weight.T + own.up_bias)

    for i, block in enumerate(model.model.layers):
        name = f"model.layers.{i}"
        normed = block.input_layernorm(x)
        f, _ = block.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
        if placement == "houlsby":
            f = f + adapter(f"{name}.attention_adapters", f)
        x = x + f
        f = block.mlp(block.post_attention_layernorm(x))
        h = {"pfeiffer": x + f, "houlsby": f, "parallel": x}[placement]
        x = x + f + adapter(f"{name}.output_adapters", h)
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_model_equals_the_formulas(placement: str) -> None:
    original = tiny_llama()
    model, adapter = adapted(original, placement=placement, reduction_factor=4)
    disturb(model)
    with torch.no_grad():
        logits = model(ids()).logits
    torch.testing.assert_close(logits, slow(original, adapter.layers, placement, ids()))
    assert (logits - original(ids()).logits).abs().max() > 0.1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_starts_near_the_base(placement: str) -> None:
    original = tiny_llama()
    model, adapter = adapted(original, placement=placement, train_layernorm=True)
    with torch.no_grad():
        logits, bare = model(ids()).logits, original(ids()).logits
    if placement == "parallel":  # its second matrix starts at zero
        assert torch.equal(logits, bare)
    assert (logits - bare).norm() < 0.01 * bare.norm()
    assert adapter.get_lr_scale("any") == 1.0 and adapter.list_init_factors() == ()
    assert adapter.num_extra_positions == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_of_every_family(name: str) -> None:
    """Wrapped and unchanged, they and second matrices of zeros leave the base as it is."""
    original = family(CONFIGS[name])
    model, _ = adapted(original, placement="houlsby", init="mam_adapter", train_layernorm=True)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, original(ids()).logits)


def test_only_the_adapter_learns() -> None:
    model, adapter = adapted(tiny_llama(), placement="houlsby", train_layernorm=True)
    model(ids()).logits.square().mean().backward()
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnt == gathered(adapter).keys()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert len(adapter.norms) == 5 and len(adapter.layers) == 4
    changes = {n for n in learnt if n.endswith("_change")}
    assert len(changes) == 5 and "model.norm.weight_change" in changes


def test_nothing_is_kept_between_forwards() -> None:
    """The stream that a hook notes is an activation: no reference outlives the forward."""
    model, adapter = adapted(tiny_llama(), placement="parallel")
    kept: list[weakref.ref[Tensor]] = []
    layer = next(iter(adapter.layers.values()))
    layer.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(args[1])))
    model(ids())
    gc.collect()
    assert kept[0]() is None


def test_rank_count_does_not_change_the_start() -> None:
    _, adapter = adapted(tiny_llama(), placement="houlsby")
    alone = gathered(adapter)
    fill(adapter, ranks=3)
    shared = gathered(adapter)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_lost_tensors_are_not_saved() -> None:
    _, adapter = adapted(tiny_llama())
    tensors = gathered(adapter)
    name = "model.layers.1.output_adapters.up_weight"
    for wrong in (None, torch.empty(0), torch.zeros(2, 2)):
        changed = {**tensors, name: wrong} if wrong is not None else dict(tensors)
        if wrong is None:
            del changed[name]
        with pytest.raises(RuntimeError, match=f"{name} (is absent|has shape)"):
            adapter.to_public_adapter(changed, "tiny/base")


# -- starting from an adapter ----------------------------------------------------------------------


def saved(directory: Path, **settings: Any) -> tuple[Path, Any]:
    """An adapter as after training, on disk, and its model."""
    model, adapter = adapted(tiny_llama(), reduction_factor=4, **settings)
    disturb(model)
    write_adapter_directory(
        directory, adapter.to_public_adapter(gathered(adapter), "tiny/base"), {}
    )
    return directory, model


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norms", [False, True])
def test_read_back(placement: str, norms: bool, tmp_path: Path) -> None:
    settings = {"placement": placement, "train_layernorm": norms}
    directory, expected = saved(tmp_path / "a", **settings)
    model, _ = adapted(
        tiny_llama(), reduction_factor=4, init_from=str(directory), **settings, seed=99
    )
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected(ids()).logits)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path / "a")
    start = {"init_from": str(directory)}
    with pytest.raises(UserError, match=r"adapter\.reduction_factor is 8\.0, but .*has 4\.0; give"):
        adapted(tiny_llama(), reduction_factor=8, **start)
    with pytest.raises(UserError, match=r"adapter\.placement is houlsby, but .* has pfeiffer"):
        adapted(tiny_llama(), reduction_factor=4, placement="houlsby", **start)
    with pytest.raises(UserError, match=r"adapter\.train_layernorm is True, but .* has False"):
        adapted(tiny_llama(), reduction_factor=4, train_layernorm=True, **start)


def test_another_base_is_refused(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path / "a")
    shorter = tiny_llama()
    del shorter.model.layers[1]
    with pytest.raises(UserError, match=r"has 2 adapters for a hidden size of 32.*needs 1 for 32"):
        adapted(shorter, reduction_factor=4, init_from=str(directory))


def test_adapter_saved_from_a_model_without_head(tmp_path: Path) -> None:
    """AdapterHub names its blocks without ``model.`` then."""
    directory, expected = saved(tmp_path / "a")
    file = directory / "adapter.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(file).items()}, file)
    (tmp_path / "a" / "dist_peft.json").unlink()  # as from the library
    model, _ = adapted(tiny_llama(), reduction_factor=4, init_from=str(directory))
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected(ids()).logits)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    start = tmp_path / "lora"
    start.mkdir()
    config = {"peft_type": "LORA", "r": 4}
    (start / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, start / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter\.init_from .* is a PEFT adapter, no bottleneck"):
        adapted(tiny_llama(), init_from=str(start))
