"""Files inside the package: templates of pages, configurations and job scripts."""

import importlib.resources

from jinja2 import Environment, StrictUndefined

__all__ = ["list_package_files", "read_package_file", "render_package_file"]

_FOLDER = "templates"


def list_package_files() -> list[str]:
    """Return the names of all files."""
    folder = importlib.resources.files("dist_peft.app").joinpath(_FOLDER)
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def read_package_file(name: str) -> str:
    """Return the text of a file."""
    folder = importlib.resources.files("dist_peft.app").joinpath(_FOLDER)
    return folder.joinpath(name).read_text(encoding="utf-8")


def render_package_file(file: str, /, **values: object) -> str:
    """Return a file with its Jinja expressions evaluated; in ``.html`` values are escaped."""
    environment = Environment(
        autoescape=file.endswith((".html", ".html.jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(read_package_file(file)).render(**values)
