"""Read and write run descriptions: YAML, ``key.sub=value`` overrides, error messages.

OmegaConf reads the YAML and the overrides, pydantic checks the tree. The user sees one message per
wrong key, with the nearest key that exists.
"""

import difflib
import re
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
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
from dist_peft.core.errors import UserError

__all__ = ["dump_config", "find_save_directory", "load_config", "load_run_config", "parse_config"]

_NO_SECTION = ("model_type", "model_attributes_type")
"""pydantic's error types for a value that is not a section."""


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


def load_run_config(path: Path, *, trust_remote_code: bool) -> RunConfig:
    """Read the ``config.yaml`` that a run has written.

    A run directory may be a stranger's. ``config.yaml`` refers to the environment at most, and such
    a reference is resolved only where its value stays on this machine
    (``core.config.environment``): in a model id it would go to the Hub.

    Args:
        trust_remote_code: whether the caller's command line allows the base's code to run.

    Raises:
        UserError: the conditions of ``load_config``; another ``${...}`` reference; or one in a path
            that does not exist here.
    """
    trust = ["base.trust_remote_code=true"] if trust_remote_code else []
    return _load_config_file(path, trust, resolved=True)


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
    key, equals, _ = item.partition("=")
    if not equals or "" in key.split(".") or key.startswith("-"):
        raise UserError(f"override {item!r} is not of the form key.sub=value")
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([item]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {item!r} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"override {item[:60]!r}... is nested too deeply") from None
    except TypeError:  # a number within the key, where the file has a list
        raise UserError(
            f"override {item!r} does not fit config file {file}: a list is replaced as a whole, "
            "such as data.train=[a.jsonl]"
        ) from None


def parse_config(tree: Any, where: str = "config") -> RunConfig:
    """Check a plain tree of dicts and lists and return the typed run description."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [
            _explain_validation_error(detail, tree) for detail in error.errors(include_url=False)
        ]
        raise UserError(f"{where}: " + "; ".join(dict.fromkeys(problems))) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved description as YAML; ``load_config`` reads it back to an equal tree.

    References to the environment stay references, and plain secrets of known forms are masked.
    ``base.trust_remote_code`` and ``data.allow_code`` are left out: a command line grants these
    permissions for itself alone.
    """
    tree = config.dump_stored_tree()
    for section, name, *_ in _PERMISSIONS:
        tree[section].pop(name, None)
    return OmegaConf.to_yaml(OmegaConf.create(_escape_interpolations(tree)))


def _escape_interpolations(value: Any) -> Any:
    """Protect ``${`` in strings (prompt templates), which OmegaConf takes for a reference."""
    if isinstance(value, dict):
        return {key: _escape_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape_interpolations(inner) for inner in value]
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _explain_validation_error(detail: ErrorDetails, tree: Any) -> str:
    path = ".".join(_list_written_keys(detail, tree))
    if detail["type"] == "extra_forbidden":
        known = _list_known_keys([part for part in detail["loc"] if isinstance(part, str)])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {path}; {hint}"
    if detail["type"] == "missing":
        return f"key {path} is required"
    if detail["type"] in _NO_SECTION:
        keys = _list_known_keys([*(p for p in detail["loc"] if isinstance(p, str)), ""])
        return (
            f"key {path or 'config'} must be a section, of keys such as {', '.join(keys[:4])} "
            f"(given: {_format_given_value(detail.get('input'))})"
        )
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    shown = "" if isinstance(given, dict | list) else f" (given: {given!r})"
    return f"key {path or 'config'}: {message}{shown}"


def _format_given_value(given: Any) -> str:
    if given is None:
        return "nothing"
    return "a list" if isinstance(given, list) else repr(given)


def _list_written_keys(detail: ErrorDetails, tree: Any) -> list[str]:
    """Return the keys the user wrote: the error's location without members of unions."""
    keys: list[str] = []
    for part in detail["loc"]:
        children = dict(enumerate(tree)) if isinstance(tree, list) else tree
        if isinstance(children, dict) and part in children:
            tree = children[part]
        elif not isinstance(part, int):  # an index without a list: one source instead of a list
            continue
        keys.append(str(part))
    return [*keys, str(detail["loc"][-1])] if detail["type"] == "missing" else keys


def _list_known_keys(location: list[str]) -> list[str]:
    """Return the keys that exist on the level of the last element of ``location``."""
    models: list[type[BaseModel]] = [RunConfig]
    for name in location[:-1]:
        inner = [
            _list_section_classes(m.model_fields[name].annotation)
            for m in models
            if name in m.model_fields
        ]
        models = [model for found in inner for model in found] or models
        tagged = [m for m in models if "kind" in m.model_fields and _read_kind_tag(m) == name]
        models = tagged or models
    return sorted({key for model in models for key in model.model_fields})


def _read_kind_tag(model: type[BaseModel]) -> object:
    return model.model_fields["kind"].default


def _list_section_classes(annotation: Any) -> list[type[BaseModel]]:
    """Return every section class inside ``Optional``, ``Union``, ``Annotated`` or ``list``
    annotations."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for inner in typing.get_args(annotation) for m in _list_section_classes(inner)]
