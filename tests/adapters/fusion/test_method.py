from pathlib import Path

import pytest
import torch

from dist_peft.adapters.bottleneck.format import parse_bottleneck_tensors
from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.core.errors import UserError
from tests.support.adapters import disturb, gathered, ids, tiny_llama
from tests.support.bottlenecks import adapted
from tests.support.fusions import NAMES, fused, save_adapters


def test_attention_on_one_adapter_is_that_adapter(tmp_path: Path) -> None:
    """Scores that choose rte everywhere, V = I: the logits are those of the adapter alone."""
    adapters = save_adapters(tmp_path, placement="houlsby")
    model, fusion = fused(adapters, ranks=3)
    alone, _ = adapted(
        tiny_llama(), placement="houlsby", reduction_factor=4, init_from=adapters[0]["path"]
    )
    for layer in fusion.layers.values():
        assert layer.names == NAMES and layer.path.split(".")[-1] in (
            "attention_adapters",
            "output_adapters",
        )
        layer.value_change.data.zero_()
        layer._compute_attention = lambda h, outputs: torch.eye(3)[0].expand(*h.shape[:-1], 3)
    with torch.no_grad():
        found, expected = model(ids()).logits, alone(ids()).logits
    torch.testing.assert_close(found, expected)


def test_only_the_fusion_learns(tmp_path: Path) -> None:
    model, fusion = fused(save_adapters(tmp_path))
    model(ids()).logits.square().mean().backward()
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    own = ("query_weight", "query_bias", "key_weight", "value_change")
    assert learnt == {f"{path}.{name}" for path in fusion.layers for name in own}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_rank_count_does_not_change_the_start(tmp_path: Path) -> None:
    adapters = save_adapters(tmp_path)
    alone, shared = (gathered(fused(adapters, ranks=ranks)[0]) for ranks in (1, 5))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_read_back(placement: str, tmp_path: Path) -> None:
    """Written, the fusion and the copies of its adapters give the same logits."""
    model, fusion = fused(save_adapters(tmp_path / "in", placement=placement))
    disturb(model)
    public = fusion.to_public_adapter(gathered(model), "tiny/base")
    write_adapter_directory(tmp_path / "out", public, {"base": "tiny/base"})
    for name in NAMES:
        first, copy = (read_adapter_directory(tmp_path / place / name) for place in ("in", "out"))
        assert copy.config == {**first.config, "name": name}
        mine, its = parse_bottleneck_tensors(first), parse_bottleneck_tensors(copy)
        assert all(torch.equal(mine[p][n], its[p][n]) for p in mine for n in mine[p])
    again, _ = fused(
        [{"path": str(tmp_path / "out" / name)} for name in NAMES], init_from=str(tmp_path / "out")
    )
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapters = save_adapters(tmp_path / "a")
    other = save_adapters(tmp_path / "houlsby", placement="houlsby")
    with pytest.raises(UserError, match=r"placement pfeiffer, .*houlsby.* houlsby: adapters that"):
        fused([adapters[0], other[1]])
    with pytest.raises(UserError, match="placement parallel: AdapterFusion is made for adapters"):
        fused(save_adapters(tmp_path / "parallel", placement="parallel"))
    norms = save_adapters(tmp_path / "norms", train_layernorm=True)
    with pytest.raises(UserError, match="has layer norms of its own, which cannot be fused"):
        fused([adapters[0], norms[1]])
    small = tiny_llama()
    small.model.layers = small.model.layers[:1]
    with pytest.raises(UserError, match=r"has 2 adapters.*base\.path needs 1.*another base"):
        fused(adapters, small)
    model, fusion = fused(adapters)
    write_adapter_directory(tmp_path / "f", fusion.to_public_adapter(gathered(model), "b"), {})
    fusions = [adapters[0], {"path": str(tmp_path / "f")}]
    with pytest.raises(UserError, match="f is no bottleneck adapter; others cannot be fused"):
        fused(fusions)
    with pytest.raises(UserError, match=r"fuses rte, mrpc, keys, and adapter\.adapters are mr"):
        fused(adapters[1:], init_from=str(tmp_path / "f"))
    with pytest.raises(UserError, match="is no fusion; give a directory with adapter_fusion"):
        fused(adapters, init_from=adapters[0]["path"])


def test_lost_tensors_are_not_saved(tmp_path: Path) -> None:
    model, fusion = fused(save_adapters(tmp_path))
    tensors = gathered(model)
    place = "model.layers.1.output_adapters"
    for name in (f"{place}.value_change", f"{place}.adapters.2.up_bias"):
        with pytest.raises(RuntimeError, match=f"{name} is absent"):
            fusion.to_public_adapter({k: v for k, v in tensors.items() if k != name}, "b")
