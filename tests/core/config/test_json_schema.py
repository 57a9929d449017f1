"""The schema for editors and the parser agree, key by key; ``jsonschema`` judges for the schema."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dist_peft.core.config.io import parse_config
from dist_peft.core.config.json_schema import build_json_schema
from dist_peft.core.config.run import RunConfig
from dist_peft.core.config.validation_messages import list_section_classes
from dist_peft.core.errors import UserError

jsonschema = pytest.importorskip("jsonschema", reason="of the dev extra")

ROOT = Path(__file__).parents[3]
VALUES: list[Any] = [None, True, 3, -1, 0.5, 10**7, "text", "", "\0", [], ["text"], {}, [1]]


@cache
def get_validator() -> Any:
    schema = build_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def is_parsed(tree: Any) -> bool:
    try:
        parse_config(tree)
    except UserError:
        return False
    return True


def build_trees(model: type[BaseModel], name: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield each key of a section, a value, and the smallest configuration that has it."""
    needs: dict[str, dict[str, Any]] = {
        "FusionConfig": {"adapters": ["a", "b"]},
        "PartialConfig": {"parts": ["norms"]},
        "BaseConfig": {"path": "m"},
        "DataConfig": {"train": ["a"]},
    }
    for key in model.model_fields:
        for value in VALUES:
            tree: dict[str, Any] = {"base": {"path": "m"}, "data": {"train": ["a"]}}
            section = dict(needs.get(model.__name__, {}))
            if "kind" in model.model_fields:
                section["kind"] = model.model_fields["kind"].default
            section[key] = value
            tree[name] = section
            yield f"{name}.{key}", value, tree


LAX = [("engine.stage", True)]  # to pydantic, True is the 1 of a Literal


@pytest.mark.parametrize("name", [n for n in RunConfig.model_fields if n != "resume"])
def test_parser_and_schema_agree(name: str) -> None:
    checked = 0
    for model in list_section_classes(RunConfig.model_fields[name].annotation):
        for key, value, tree in build_trees(model, name):
            accepted = get_validator().is_valid(tree)
            if is_parsed(tree):
                assert accepted or (key, value) in LAX, (key, value)
            elif accepted:  # rules of a whole section, and of text
                with pytest.raises(UserError) as caught:
                    parse_config(tree)
                message = str(caught.value)
                assert "Input should be" not in message, (message, tree)
            checked += 1
    assert checked >= 5 * len(VALUES)


@pytest.mark.parametrize(
    "text",
    [
        *[p.read_text() for p in sorted((ROOT / "configs").glob("*.yaml"))],
        "base: {path: m}\ndata: {train: a.jsonl}",
        "base: {path: m}\ndata: {train: {path: a, labels: [0, 1], format: classification}}",
        "base: {path: m, quant: null}\ndata: {train: [a, {path: b}], eval: [c]}\nresume: never",
        "base: {path: m}\ndata: {train: [a]}\nadapter: {r: 8}",
        "base: {path: m}\ndata: {train: [a]}\nadapter: {kind: prefix, projection: false}",
        "base: {path: m}\ndata: {train: [a]}\nadapter: {kind: fusion, adapters: [a, {path: b}]}",
        "base: {path: m}\ndata: {train: [{path: a, augment: {kind: token_dropout}}]}",
    ],
)
def test_valid_files(text: str) -> None:
    assert list(get_validator().iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        "base: {path: m}",
        "base: {path: m}\ndata: {train: []}",
        "base: {path: m}\ndata: {train: [a]}\ntrian: {}",
        "base: {path: m}\ndata: {train: [{path: a, fromat: chat}]}",
        "base: {path: m}\ndata: {train: [a]}\nadapter: {kind: qlora}",
        "base: {path: m}\ndata: {train: [a]}\nadapter: {num_virtual_tokens: 8}",
        "base: {path: m}\ndata: {train: [a]}\nadapter: {r: 0}",
        "base: {path: m}\ndata: {train: [{path: a, augment: {num_aug: 2}}]}",
    ],
)
def test_wrong_files(text: str) -> None:
    assert not get_validator().is_valid(yaml.safe_load(text))
    assert not is_parsed(yaml.safe_load(text))


def test_keys_have_their_descriptions_and_defaults() -> None:
    sections = build_json_schema()["$defs"]
    rate = sections["TrainConfig"]["properties"]["lr"]
    assert rate == {
        "default": 2e-4,
        "description": "Peak learning rate.",
        "exclusiveMinimum": 0,
        "type": "number",
    }
    assert sections["LoraConfig"].get("required") is None
    assert sections["PrefixConfig"]["required"] == ["kind"]
    assert sections["FunctionAugmentConfig"]["required"] == ["kind", "function"]
