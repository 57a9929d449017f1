"""Read and write run descriptions: YAML, ``key.sub=value`` overrides, error messages.

OmegaConf reads the YAML and the overrides, pydantic checks the tree. The user sees one message per
wrong key, with the key that it stands for (``validation_messages``).
"""

import re
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from dist_peft.core.config.environment import (
    Reference,
    find_references,
    has_other_reference,
    locate_references,
    resolve_stored_references,
)
from dist_peft.core.config.moved_paths import resolve_moved_paths
from dist_peft.core.config.run import RunConfig, SaveConfig
from dist_peft.core.config.validation_messages import explain_validation_errors
from dist_peft.core.errors import UserError

__all__ = [
    "dump_config",
    "escape_interpolations",
    "find_save_directory",
    "load_config",
    "load_run_config",
    "parse_config",
]


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``key.sub=value`` overrides, check everything.

    ``base.trust_remote_code`` and ``data.allow_code`` count only among the overrides, which the
    caller wrote; a file may come from a stranger.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, a value is wrong, or the file
            asks for code of the base to be run.
    """
    return _load_config_file(Path(path), overrides)


def find_save_directory(path: str | Path, overrides: typing.Sequence[str] = ()) -> Path | None:
    """Return ``save.dir`` of a configuration that may be wrong in other keys; None if unknown."""
    file = Path(path)
    with suppress(
        UserError, YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError
    ):
        if file.is_file():
            tree = _load_sections(file)
            for item in overrides:
                if item.startswith("save.dir="):
                    tree = _apply_override(tree, item, file)
            found = OmegaConf.select(tree, "save.dir", default=SaveConfig().dir)
            if isinstance(found, str) and found and "\0" not in found:
                return Path(found)
    return None


def load_run_config(
    path: Path, overrides: typing.Sequence[str] = (), *, trust_remote_code: bool
) -> RunConfig:
    """Read the ``config.yaml`` that a run has written.

    A run directory may be a stranger's. ``config.yaml`` refers to the environment at most, and such
    a reference is resolved only where its value stays on this machine
    (``core.config.environment``): in a model id it would go to the Hub.

    Args:
        overrides: ``key.sub=value``, which the caller wrote.
        trust_remote_code: whether the caller's command line allows the base's code to run.

    Raises:
        UserError: the conditions of ``load_config``; another ``${...}`` reference; or one in a path
            that does not exist here.
    """
    trust = ["base.trust_remote_code=true"] if trust_remote_code else []
    return _load_config_file(path, [*trust, *overrides], resolved=True)


def _load_config_file(
    file: Path, overrides: typing.Sequence[str], *, resolved: bool = False
) -> RunConfig:
    if not file.is_file():
        what = "is no file" if file.exists() else "does not exist"
        raise UserError(f"config file {file} {what}; give --config a YAML file")
    try:
        tree = _load_sections(file)
        if resolved and (key := _find_interpolation(tree)) is not None:
            raise UserError(
                f"{file} has a ${{...}} reference in {key}; a run writes its configuration "
                "resolved, so this file was changed: write the value itself"
            )
        for item in overrides:
            tree = _apply_override(tree, item, file)
        if resolved:
            references, (plain, refused) = {}, resolve_stored_references(tree)
            if refused is not None:
                raise UserError(
                    f"{file} has a ${{...}} reference in {refused} that leads to nothing on this "
                    "machine. Set its variable to an existing path, or write the value itself: a "
                    "value of the environment is not sent to the Hub"
                )
        else:
            references = find_references(tree)
            plain = OmegaConf.to_container(tree, resolve=True)
        _refuse_trust_in_file(plain, overrides, file)
        if file.name == "config.yaml":
            resolve_moved_paths(plain, file.parent)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} is not valid YAML: {error}") from None
    except OmegaConfBaseException as error:
        raise UserError(
            f"config file {file}, with its overrides, has a wrong ${{...}} reference: {error}; "
            "write \\${ for a literal ${"
        ) from None
    except OSError as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(
            f"config file {file} is nested too deeply, or refers to itself; no key of a run needs "
            "more than a few levels"
        ) from None
    config = parse_config(plain, str(file))
    return config.with_references(locate_references(references, config.model_dump(mode="json")))


def _load_sections(file: Path) -> Any:
    try:
        tree = OmegaConf.load(file)
    except OSError as error:
        if error.errno is not None:
            raise
        tree = None  # OmegaConf's error for a lone number has no number of the system's
    if not OmegaConf.is_dict(tree):
        raise UserError(f"config file {file} must hold sections such as base: and data:")
    return tree


def _find_interpolation(node: Any, path: str = "") -> str | None:
    """Return the first key below ``node`` that refers to more than the environment."""
    keys = range(len(node)) if OmegaConf.is_list(node) else list(node)
    for key in keys:
        name = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_interpolation(node, key):
            texts: Any = OmegaConf.to_container(node, resolve=False)
            if has_other_reference(str(texts[key])):
                return name
            continue
        if OmegaConf.is_missing(node, key):
            continue
        if OmegaConf.is_config(node[key]) and (found := _find_interpolation(node[key], name)):
            return found
    return None


def _refuse_trust_in_file(plain: Any, overrides: typing.Sequence[str], file: Path) -> None:
    """Refuse ``base.trust_remote_code`` and ``data.allow_code`` from the file.

    Raises:
        UserError: one is on, and no override sets it.
    """
    given = OmegaConf.from_dotlist(list(overrides))
    for section, name, what, whom, verbs in _PERMISSIONS:
        values, key = plain.get(section), f"{section}.{name}"
        if not isinstance(values, dict) or not values.get(name):
            continue
        if OmegaConf.select(given, key) is None:
            raise UserError(
                f"config file {file} sets {key}, which runs {what}; a file cannot grant that "
                f"permission. If you trust {whom}, say so on the command line: {key}=true{verbs}"
            )


_PERMISSIONS = (
    (
        "base",
        "trust_remote_code",
        "code that comes with the base",
        "the base",
        " (merge, export: --trust-remote-code)",
    ),
    ("data", "allow_code", "the functions of data.train[].augment", "them", ""),
)
"""Keys that let code run: section, name, which code, whom it takes trust in, options of verbs."""


def _apply_override(tree: Any, item: str, file: Path) -> Any:
    """Return ``tree`` with the value of ``item``, which replaces a list or ``{...}`` as a whole."""
    key, equals, text = item.partition("=")
    if not equals or "" in key.split(".") or key.startswith("-"):
        raise UserError(f"override {item!r} is not of the form key.sub=value")
    try:
        given = OmegaConf.from_dotlist([item])
        if text.lstrip().startswith("{"):
            tree = OmegaConf.merge(tree)  # a copy
            OmegaConf.update(tree, key, None, merge=False, force_add=True)
        return OmegaConf.merge(tree, given)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {item!r} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"override {item[:60]!r}... is nested too deeply") from None
    except (TypeError, ValueError):  # a number within the key, where the file has a list
        raise UserError(
            f"override {item!r} does not fit config file {file}: a list is replaced as a whole, "
            "such as data.train=[a.jsonl]"
        ) from None


def parse_config(tree: Any, where: str = "config") -> RunConfig:
    """Check a plain tree of dicts and lists and return the typed run description."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = explain_validation_errors(error.errors(include_url=False), tree)
        raise UserError(f"{where}: " + "; ".join(problems)) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved description as YAML; ``load_config`` reads it back to an equal tree.

    References to the environment stay references, and plain secrets of known forms are masked.
    ``base.trust_remote_code`` and ``data.allow_code`` are left out: a command line grants these
    permissions for itself alone.
    """
    tree = config.dump_stored_tree()
    for section, name, *_ in _PERMISSIONS:
        tree[section].pop(name, None)
    return OmegaConf.to_yaml(OmegaConf.create(escape_interpolations(tree)))


def escape_interpolations(value: Any) -> Any:
    """Protect ``${`` in strings (prompt templates), which OmegaConf takes for a reference.

    Args:
        value: a plain tree; instances of ``Reference`` stay references.
    """
    if isinstance(value, dict):
        return {key: escape_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escape_interpolations(inner) for inner in value]
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
