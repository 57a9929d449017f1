from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import (
    BaseConfig,
    DataConfig,
    DataSource,
    LoraConfig,
    NoAdapterConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dist_peft.core.errors import UserError

LEAST: dict[str, Any] = {"base": {"path": "model"}, "data": {"train": ["a.jsonl"]}}


def _config(**sections: Any) -> RunConfig:
    return parse_config({**LEAST, **sections})


def _sections(model: type[BaseModel] = RunConfig) -> list[type[BaseModel]]:
    found = [model]
    for child in model.__subclasses__():
        found += _sections(child)
    return found


def test_only_two_keys_have_no_default() -> None:
    config = _config()
    assert config.base == BaseConfig(path="model")
    assert config.base.quant == QuantConfig()
    assert config.adapter == LoraConfig()
    assert config.data.train == [DataSource(path="a.jsonl")]
    assert config.train == TrainConfig()
    assert config.resume == "auto"
    with pytest.raises(UserError, match="key base is required; key data is required"):
        parse_config({})
    with pytest.raises(UserError, match=r"key base.path is required; key data.train is required"):
        parse_config({"base": {}, "data": {}})


@pytest.mark.parametrize("section", _sections(RunConfig.__mro__[1]), ids=lambda s: s.__name__)
def test_every_key_has_a_description_and_every_section_a_docstring(
    section: type[BaseModel],
) -> None:
    assert section.__doc__
    undescribed = [
        name
        for name, info in section.model_fields.items()
        if not info.description and name != "kind" and not _is_section(info.annotation)
    ]
    assert undescribed == []


def _is_section(annotation: Any) -> bool:
    text = str(annotation)
    return "Config" in text


def test_a_configuration_cannot_be_changed() -> None:
    config = _config()
    for section, key in [(config, "resume"), (config.train, "lr"), (config.base.quant, "bits")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)
    with pytest.raises(ValidationError, match="frozen"):
        del config.train.lr


def test_a_source_may_be_a_bare_path_or_a_single_entry() -> None:
    wanted = [DataSource(path="a.jsonl")]
    for given in ("a.jsonl", ["a.jsonl"], {"path": "a.jsonl"}, [{"path": "a.jsonl"}]):
        config = _config(data={"train": given, "eval": given})
        assert config.data.train == wanted
        assert config.data.eval == wanted
    mixed = _config(data={"train": ["a.jsonl", {"path": "b.csv", "limit": 3}]})
    assert mixed.data.train == [*wanted, DataSource(path="b.csv", limit=3)]


@pytest.mark.parametrize("key", ["train", "eval"])
@pytest.mark.parametrize("value", [5, True, 2.5])
def test_sources_that_are_no_list_are_named(key: str, value: Any) -> None:
    """Before, a number in data.train was a traceback."""
    sections = {"base": {"path": "b"}, "data": {"train": ["a.jsonl"], key: value}}
    with pytest.raises(ValueError, match=rf"data.{key}\n"):
        RunConfig.model_validate(sections)


def test_the_paths_given_are_not_changed_in_place() -> None:
    tree = {"train": ["a.jsonl"]}
    DataConfig.model_validate(tree)
    assert tree == {"train": ["a.jsonl"]}


def test_no_quantization_and_no_adapter() -> None:
    config = _config(base={"path": "m", "quant": None}, adapter={"kind": "none"})
    assert config.base.quant is None
    assert config.adapter == NoAdapterConfig()


def test_an_adapter_without_kind_is_lora() -> None:
    assert _config(adapter={"r": 8}).adapter == LoraConfig(r=8)
    assert _config(adapter={}).adapter == LoraConfig()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"base": {"path": "m", "quant": {"bits": 3}}},
            "key base.quant: nf4 has 4 bits, not 3; use kind: int",
        ),
        (
            {"base": {"path": "m", "quant": {"solver": "hqq"}}},
            "key base.quant: nf4 rounds to nearest; solver hqq is for kind: int",
        ),
        (
            {"base": {"path": "m", "quant": {"group_size": 12}}},
            "key base.quant: group_size 12 is not a multiple of 8",
        ),
        ({"base": {"path": "m", "quant": {"group_size": 0}}}, "greater than or equal to 8"),
        ({"base": {"path": "m", "quant": {"kind": "int", "bits": 5}}}, "key base.quant.bits: "),
        ({"data": {"train": []}}, "key data.train: List should have at least 1 item"),
        ({"data": {"train": ["a"], "seq_len": 4}}, "key data.seq_len: "),
        (
            {"train": {"steps": 3, "epochs": 1}},
            "key train: give train.steps or train.epochs, not both",
        ),
        ({"train": {"steps": 0}}, "key train.steps: "),
        ({"train": {"lr": 0}}, "key train.lr: Input should be greater than 0 (given: 0)"),
        ({"train": {"lr": float("inf")}}, "key train.lr: Input should be a finite number"),
        ({"train": {"warmup": float("nan")}}, "key train.warmup: Input should be a finite"),
        ({"train": {"betas": [0.9, 1.0]}}, "key train.betas.1: Input should be less than 1"),
        ({"train": {"betas": [0.9]}}, "key train.betas"),
        ({"train": {"min_lr_ratio": 1.5}}, "key train.min_lr_ratio: "),
        ({"adapter": {"dropout": 1.0}}, "key adapter.dropout: Input should be less than 1"),
        ({"adapter": {"r": 0}}, "key adapter.r: "),
        ({"adapter": {"rank_pattern": {"q_proj": 0}}}, "key adapter.rank_pattern.q_proj: "),
        ({"adapter": {"alpha_pattern": {"q_proj": 0}}}, "key adapter.alpha_pattern.q_proj: "),
        ({"adapter": {"kind": "lorra"}}, "key adapter: Input tag 'lorra'"),
        ({"engine": {"shard_group": 0}}, "key engine.shard_group: "),
        ({"engine": {"shard_group": "rack"}}, "key engine.shard_group: Input should be 'all'"),
        ({"engine": {"kind": "zero4"}}, "key engine.kind: "),
        ({"save": {"keep": 0}}, "key save.keep: "),
        (
            {"data": {"train": [{"path": "a", "weight": 2.0}]}},
            "key data: train[0].weight needs mixing: weights, not joined",
        ),
        (
            {"data": {"train": ["a", {"path": "b", "to_step": 9}]}},
            "key data: train[1].to_step needs mixing: sizes or weights, not joined",
        ),
        (
            {"data": {"train": ["a"], "temperature": 2.0, "mixing": "weights"}},
            "key data: temperature needs mixing: sizes, not weights",
        ),
        (
            {"data": {"train": [{"path": "a", "from_step": 5, "to_step": 5}]}},
            "key data.train.0: to_step 5 is not after from_step 5",
        ),
        (
            {"data": {"train": [{"path": p, "name": "x"} for p in "ab"]}},
            "key data: two sources of train have the same name",
        ),
    ],
)
def test_values_that_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        _config(**sections)
    assert words in str(caught.value)


@pytest.mark.parametrize("group", ["all", "node", 1, 8])
def test_shard_groups(group: Any) -> None:
    assert _config(engine={"shard_group": group}).engine.shard_group == group


# -- classification ----------------------------------------------------------------------------


def _classifying(**changes: Any) -> dict[str, Any]:
    source = {"path": "a.tsv", "format": "classification", "labels": ["no", "yes"]}
    tree = {"base": {"path": "m", "head": "classifier"}, "data": {"train": [source]}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    return tree


def _labelled(*labels: Any, **fields: Any) -> dict[str, Any]:
    return {"path": "a.tsv", "format": "classification", "labels": list(labels), **fields}


def test_classification_has_rows_of_one_record() -> None:
    config = RunConfig.model_validate(_classifying())
    assert config.data.is_classification and not config.data.packing
    assert RunConfig.model_validate(config.model_dump()) == config
    numbers = DataSource.model_validate(_labelled(0, 1))
    assert numbers.labels == ["0", "1"]
    assert not RunConfig.model_validate({"base": {"path": "m"}, "data": {"train": ["a"]}}).data.eval


_PLAIN = {"train": ["a.jsonl"], "eval": ["b.jsonl"]}
_BEST = {"data__eval": [_labelled("a", "b")], "train__eval_every": 1, "train__early_stop": 1}


def test_metrics_for_the_best_checkpoint() -> None:
    for metric in ("accuracy", "macro_f1", "matthews", "f1"):
        train = [_labelled("a", "b", positive_label="b")]
        changes = {**_BEST, "data__train": train, "train__metric_for_best": metric}
        config = RunConfig.model_validate(_classifying(**changes))
        assert config.train.metric_for_best == metric


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__packing": True}, "packing: true is not for classification"),
        ({"base__head": "lm"}, "base.head is lm"),
        ({"data": {"train": ["a.jsonl"]}}, "the sources have another"),
        ({"data__eval": ["a.jsonl"]}, "either all sources have format: classification or none"),
        ({"data__train": [_labelled()]}, r"train\[0\].labels is missing"),
        ({"data__train": [_labelled("a")]}, "at least two different values"),
        ({"data__train": [_labelled("a", "a")]}, "at least two different values"),
        ({"data__train": [_labelled("a", "b", format="text")]}, "labels are for format: class"),
        ({"data__train": [_labelled(True, False)]}, "in quotes, as the table has it"),
        ({"adapter": {"kind": "prefix"}}, "adapter.kind prefix puts virtual tokens"),
        ({"data__train": [_labelled("a", "b", positive_label="c")]}, "c is not one of labels"),
        ({"data__train": [_labelled(column_names=["x", "x"])]}, "has a name twice"),
        ({**_BEST, "train__metric_for_best": "f1"}, "one training source with positive_label"),
        ({**_BEST, "base__head": "lm", "data": _PLAIN, "train__metric_for_best": "f1"}, "use loss"),
        ({"train__metric_for_best": "matthews"}, "has no effect without"),
    ],
)
def test_wrong_classification(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(_classifying(**changes))
