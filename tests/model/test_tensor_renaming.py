"""Renamings of tensors, the same as those of ``transformers`` where it has the function."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from transformers import core_model_loading
from transformers.core_model_loading import WeightRenaming

from dist_peft.model.tensor_renaming import rename_tensor

PACKAGE = Path(__file__).parents[2] / "dist_peft"
NEWER_THAN_LOWEST = {"apply_renamings", "apply_converters"}
"""Names of ``transformers.core_model_loading`` that 5.16 has not."""

NAMES = ["model.block.0.gamma", "block.0.gamma", "model.layers.1.beta", "lm_head.weight", ""]


def make_renamings() -> list[WeightRenaming]:
    return [
        WeightRenaming("gamma", "weight"),
        WeightRenaming("^model.block", "model.layers"),
        WeightRenaming(r"layers.0.weight", "layers.0.norm.weight"),
    ]


def test_all_renamings_that_match_are_applied_in_order() -> None:
    assert rename_tensor("model.block.0.gamma", make_renamings()) == "model.layers.0.norm.weight"
    assert rename_tensor("lm_head.weight", make_renamings()) == "lm_head.weight"
    assert rename_tensor("anything", []) == "anything"


@pytest.mark.skipif(
    not hasattr(core_model_loading, "apply_renamings"), reason="transformers below 5.20"
)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_transformers(name: str) -> None:
    expected = core_model_loading.apply_renamings(name, make_renamings())
    assert rename_tensor(name, make_renamings()) == expected


def test_no_module_imports_names_that_the_lowest_version_lacks() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                found |= {alias.name for alias in node.names} & NEWER_THAN_LOWEST
    assert not found


def test_every_module_of_transformers_that_is_imported_exists() -> None:
    modules = set()
    for path in PACKAGE.rglob("*.py"):
        modules |= set(re.findall(r"^\s*from (transformers[.\w]*) import", path.read_text(), re.M))
    assert len(modules) > 5
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
