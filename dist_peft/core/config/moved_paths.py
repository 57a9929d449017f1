"""Paths of a run directory that was moved, alone or together with the files it was made from.

``paths.json`` next to a run's ``config.yaml`` keeps, by key, each local path as the configuration
gives it, absolute and relative to the run directory. Where a configuration is read from a run
directory, a path that still has the recorded value is looked for relative to the run first, then
at its absolute place. Contents are compared elsewhere: another base at the place of the old one is
refused by its fingerprint.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError

__all__ = ["PATHS_NAME", "format_path_record", "resolve_moved_paths"]

PATHS_NAME = "paths.json"

_SINGLE = (("base", "path"), ("engine", "deepspeed_config"))
_LISTS = (("adapter", "adapters"), ("data", "train"), ("data", "eval"))


def format_path_record(tree: dict[str, Any], run_dir: Path) -> str:
    """Return the text of ``paths.json`` for the configuration ``tree`` of a run.

    Paths that do not exist, such as hub ids, are left out.
    """
    record = {
        key: {
            "given": section[name],
            "absolute": os.path.abspath(section[name]),
            "from_run": os.path.relpath(section[name], run_dir),
        }
        for key, section, name in _iterate_path_keys(tree)
        if os.path.exists(os.path.expanduser(section[name]))
    }
    given = tree.get("save", {}).get("dir")
    return json.dumps({"save.dir": {"given": given}, **record}, indent=1) + "\n"


def resolve_moved_paths(tree: Any, run_dir: Path) -> None:
    """Replace, in place, recorded paths of ``tree`` by where the files are now.

    ``save.dir`` becomes ``run_dir``. Nothing changes without ``paths.json`` in ``run_dir``.

    Raises:
        UserError: ``paths.json`` is damaged.
    """
    file = run_dir / PATHS_NAME
    if not isinstance(tree, dict) or not file.is_file():
        return
    try:
        record: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
        for key, section, name in _iterate_path_keys(tree):
            if key in record and record[key]["given"] == section[name]:
                section[name] = _find_path(record[key], run_dir)
        save = tree.get("save")
        if isinstance(save, dict) and save.get("dir") == record["save.dir"]["given"]:
            save["dir"] = _keep_if_same(str(save["dir"]), str(run_dir))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}); remove it, and give paths in config.yaml that exist"
        ) from None


def _find_path(record: dict[str, str], run_dir: Path) -> str:
    candidates = (os.path.normpath(run_dir / record["from_run"]), record["absolute"])
    found = next((path for path in candidates if os.path.exists(path)), record["given"])
    return _keep_if_same(record["given"], found)


def _keep_if_same(given: str, found: str) -> str:
    """Return ``given``, which messages and comparisons know, where both are the same file."""
    try:
        return given if os.path.samefile(given, found) else found
    except OSError:
        return found


def _iterate_path_keys(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each key that holds a path, the section that it is in, and its name there."""
    for section_name, name in _SINGLE:
        section = tree.get(section_name)
        if isinstance(section, dict) and isinstance(section.get(name), str):
            yield f"{section_name}.{name}", section, name
    for section_name, name in _LISTS:
        entries = (tree.get(section_name) or {}).get(name)
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                yield f"{section_name}.{name}[{number}].path", entry, "path"
                augment = entry.get("augment")
                if isinstance(augment, dict) and isinstance(augment.get("synonyms"), str):
                    yield f"{section_name}.{name}[{number}].augment.synonyms", augment, "synonyms"
