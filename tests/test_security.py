"""Each line of docs/security.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

from dist_peft.core.config.io import load_config
from dist_peft.core.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()


def list_rows() -> list[str]:
    """Table rows without heads."""
    heads = re.findall(r"^(\|[^\n]*)\n\|[-|]+\|$", PAGE, re.MULTILINE)
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [row for row in rows if row not in heads and not re.fullmatch(r"[-|]+", row)]


def test_each_line_names_a_test() -> None:
    rows = list_rows()
    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r"`tests/\S+\.py::test_\w+`", row)]


def test_the_named_tests_exist() -> None:
    for file, name in re.findall(r"`(tests/\S+?\.py)::(\w+)`", PAGE):
        tree = ast.parse((ROOT / file).read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_what_is_trusted_is_said() -> None:
    """These lines have no test: they say what is not defended."""
    trusted = PAGE.partition("## Trusted")[2]
    assert trusted.count("\n- ") == 4 and "|" not in trusted


def test_tag_of_python_in_a_configuration_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    file = tmp_path / "run.yaml"
    file.write_text(f"base: {{path: !!python/object/apply:os.mkdir ['{ran}']}}\n")
    with pytest.raises(UserError, match=r"run\.yaml is not valid YAML"):
        load_config(file)
    assert not ran.exists()
