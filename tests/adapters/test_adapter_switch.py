"""With its adapter off a model computes what the base computes, bit for bit, on every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.adapters.adapter_switch import disable_adapter
from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.train.evaluate import inference_mode
from tests.support.classification_runs import classifying_tree, save_classifier_base
from tests.support.dist import run_ranks
from tests.support.tiny_models import CONFIGS, MIXTURES, save_model
from tests.support.tiny_runs import save_words, tiny_tree

CPU = torch.device("cpu")
NF4 = {"kind": "nf4", "group_size": 32}
INT4 = {"kind": "int", "bits": 4, "group_size": 16}

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"r": 5, "dropout": 0.5}, "quant": NF4},
    "dora, embeddings": {"adapter": {"r": 4, "use_dora": True}},
    "lora on embeddings": {"adapter": {"r": 4, "embeddings": True}},
    "lora on experts": {"adapter": {"r": 3}, "family": "mixtral"},
    "qalora": {
        "adapter": {"kind": "qalora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "quant": INT4,
    },
    "vera": {"adapter": {"kind": "vera", "r": 5}},
    "ia3": {"adapter": {"kind": "ia3"}},
    "bottleneck": {"adapter": {"kind": "bottleneck", "train_layernorm": True}},
    "prompt": {"adapter": {"kind": "prompt", "num_virtual_tokens": 3, "init": "random"}},
    "ptuning": {"adapter": {"kind": "ptuning", "num_virtual_tokens": 3}},
    "prefix": {"adapter": {"kind": "prefix", "num_virtual_tokens": 3}},
}
INITIAL = {
    "pissa": {"adapter": {"r": 4, "init": "pissa"}, "quant": NF4},
    "loftq": {"adapter": {"r": 4, "init": "loftq"}, "quant": NF4},
}


def trees(directory: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A configuration of each kind, on one base of each family."""
    made = {}
    for name, kind in kinds.items():
        family = kind.get("family", "llama")
        tree = tiny_tree(directory, adapter=kind["adapter"], base__quant=kind.get("quant"))
        base = directory / family
        if not base.exists():
            save_model({**CONFIGS, **MIXTURES}[family], base)
            save_words(base)
        made[name] = {**tree, "base": {**tree["base"], "path": str(base)}}
    return made


def fusion_tree(directory: Path) -> dict[str, Any]:
    """A fusion of two adapters that are far from their start."""
    tree = trees(directory, {"bottleneck": {"adapter": {"kind": "bottleneck"}}})["bottleneck"]
    paths = []
    for number in range(2):
        built = load(World(), {**tree, "train": {**tree["train"], "seed": number}})
        paths.append(str(directory / f"adapter{number}"))
        tensors, base = built.gather_adapter(), tree["base"]["path"]
        public = built.setup.adapter.to_public_adapter(tensors, base)
        write_adapter_directory(Path(paths[-1]), public, {})
    adapters = [{"path": path, "name": f"n{number}"} for number, path in enumerate(paths)]
    return {**tree, "adapter": {"kind": "fusion", "adapters": adapters}}


def load(world: World, tree: dict[str, Any]) -> LoadedModel:
    """The loaded model, with an adapter that is far from its start."""
    config = parse_config(tree)
    built = load_weights(build_model(resolve_config(config)), world, CPU)
    with torch.no_grad():
        for parameter in trainable_parameters(built.model).values():
            parameter.add_(0.3)
    return built


def compute_logits(built: LoadedModel) -> torch.Tensor:
    """Logits of a packed sequence: two documents."""
    ids = torch.arange(5, 17)[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with inference_mode(built.model):
        logits: torch.Tensor = built.model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).logits
        return logits


Logits = dict[str, torch.Tensor]


def switch(world: World, tree: dict[str, Any]) -> Logits:
    """Logits with the adapter on, off, in a body that raises, and after it; and of the base."""
    built = load(world, tree)
    on = compute_logits(built)
    with disable_adapter(built.model):
        off = compute_logits(built)
        with pytest.raises(KeyError), disable_adapter(built.model):
            raise KeyError
        nested = compute_logits(built)
    with pytest.raises(ValueError, match="broken"), disable_adapter(built.model):
        raise ValueError("broken")
    base = compute_logits(load(world, {**tree, "adapter": {"kind": "none"}}))
    again = compute_logits(built)
    return {"on": on, "off": off, "nested": nested, "again": again, "base": base}


def switch_all(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, Logits]:
    return {name: switch(world, tree) for name, tree in trees.items()}


@pytest.mark.dist
def test_logits_are_those_of_the_base(tmp_path: Path) -> None:
    made = {**trees(tmp_path, KINDS), "fusion": fusion_tree(tmp_path)}
    sharded = ("lora", "bottleneck", "prompt")
    for ranks, cases in ((1, made), (2, {name: made[name] for name in sharded})):
        for found in run_ranks(switch_all, ranks, cases):
            for name, logits in found.items():
                assert torch.equal(logits["off"], logits["base"]), (name, ranks)
                assert torch.equal(logits["nested"], logits["base"]), (name, ranks)
                assert torch.equal(logits["again"], logits["on"]), (name, ranks)
                assert (logits["on"] - logits["base"]).abs().max() > 1e-3, (name, ranks)


@pytest.mark.parametrize("name", INITIAL)
def test_initial_factors_stay(name: str, tmp_path: Path) -> None:
    """The stored base is a residual: off is the function that training started from."""
    (tree,) = trees(tmp_path, {name: INITIAL[name]}).values()
    config = parse_config(tree)
    start = compute_logits(load_weights(build_model(resolve_config(config)), World(), CPU))
    logits = switch(World(), tree)
    torch.testing.assert_close(logits["off"], start, rtol=1e-5, atol=1e-6)
    assert (logits["off"] - logits["on"]).abs().max() > 1e-3
    assert torch.equal(logits["again"], logits["on"])


def test_refused_where_the_base_is_gone(tmp_path: Path) -> None:
    partial = {"adapter": {"kind": "partial", "parts": ["norms"]}}
    (tree,) = trees(tmp_path, {"partial": partial}).values()
    base = save_classifier_base(tmp_path / "bert", "bert")
    headed = classifying_tree(tmp_path, base)
    for each in (tree, headed):
        built = load(World(), each)
        before = compute_logits(built) if each is tree else None
        with (
            pytest.raises(UserError, match="weights of the base or a classification head"),
            disable_adapter(built.model),
        ):
            raise AssertionError("not reached")
        assert before is None or torch.equal(compute_logits(built), before)
