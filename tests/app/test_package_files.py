"""Templates are inside the package, and so inside its wheel."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import dist_peft
from dist_peft.app.package_files import list_package_files, read_package_file, render_package_file

PACKAGE = Path(dist_peft.__file__).parent


def test_every_file_is_package_data() -> None:
    """The patterns of pyproject.toml, by which setuptools fills the wheel, match each file."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["dist_peft"]
    names = list_package_files()
    assert names
    for name in names:
        assert (PACKAGE / "app" / "templates" / name).is_file()
        assert any(fnmatch(f"app/templates/{name}", pattern) for pattern in patterns), name
    stray = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert stray == {"py.typed", *(f"app/templates/{name}" for name in names)}


def test_values_are_escaped_in_pages_and_must_be_given() -> None:
    assert "{% for" in read_package_file("validation.html.jinja")
    with pytest.raises(UndefinedError):
        render_package_file("validation.html.jinja", name="a")
