"""Names of files, functions and classes say what they are; docstrings say more than "see there"."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dist_peft"
SKIPPED = ("__init__.py", "__main__.py")
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in SKIPPED)

# The files of every adapter method (docs/extending.md); the folder says whose they are.
METHOD_FILES = {"layer.py", "method.py", "format.py", "merge.py"}

# One word that says nothing without the line that assigned it.
VAGUE_NAMES = {"base", "method", "module", "rows", "start", "trained"}

# ``AdapterModule.base``: the wrapped module. It is part of parameter names in checkpoints.
ALLOWED_VAGUE = {
    "adapters/bottleneck/layer.py: base",
    "adapters/fusion/layer.py: base",
    "adapters/virtual_tokens/encoder.py: base",
    "model/adapter_module.py: base",
}

# Fields and parameters that a caller names. ``module``, ``base`` and ``rows`` are what PyTorch code
# calls a module, a base and a row count; ``start`` is the usual name for one end of a range.
VAGUE_ARGUMENTS = {"method", "trained"}
MAX_VAGUE_ARGUMENTS = 8

POINTER = re.compile(
    r"\A(See (the|``)|Raises:)|[Ss]ee the module docstring|\bsee (there|above)\b", re.MULTILINE
)


def iterate_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def test_no_file_name_stands_in_two_packages() -> None:
    places = defaultdict(set)
    for path in SOURCES:
        is_method = path.parts[-3] == "adapters" and path.name in METHOD_FILES
        is_verb = path.parent.name == "commands"  # called as the user calls it
        if not is_method and not is_verb:
            places[path.name].add(str(path.relative_to(PACKAGE)))
    twice = {name: sorted(paths) for name, paths in places.items() if len(paths) > 1}
    assert not twice


def test_functions_and_classes_say_of_what() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in SOURCES
        for node in iterate_definitions(path)
        if node.name.strip("_").lower() in VAGUE_NAMES
    }
    assert found == ALLOWED_VAGUE


def test_few_arguments_and_fields_are_vague() -> None:
    found = []
    for path in SOURCES:
        for node in iterate_definitions(path):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
            else:
                targets = [b.target for b in node.body if isinstance(b, ast.AnnAssign)]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            place = f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
            found += [f"{place} {name}" for name in names if name in VAGUE_ARGUMENTS]
    assert len(found) <= MAX_VAGUE_ARGUMENTS, "\n".join(found)


def test_no_docstring_only_points_elsewhere() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in iterate_definitions(path)
        if POINTER.search(ast.get_docstring(node) or "")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("See the module docstring.", True),
        ("See ``Adapter``.", True),
        ("Raises: UserError: always.", True),
        ("Args:\n    spec: see there.", True),
        ("LoRA's layer. See the module docstring.", True),
        ("Read rows. See ``Adapter`` for the order.", False),
    ],
)
def test_a_pointer_is_recognized(text: str, points: bool) -> None:
    assert bool(POINTER.search(text)) is points
