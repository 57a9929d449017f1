"""Messages about a wrong key or value of a configuration: its name, and the fix.

An unknown key is looked for in this order: among keys of other trainers (``peer_keys``), by the
same name for another kind of adapter or in another section, by spelling. A wrong value is looked
for among values of other trainers (``peer_values``).
"""

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from dist_peft.core.config.peer_keys import find_peer_key
from dist_peft.core.config.peer_values import describe_peer_value
from dist_peft.core.config.run import RunConfig

__all__ = ["explain_validation_errors", "list_config_keys", "list_section_classes"]

_NO_SECTION = ("model_type", "model_attributes_type")
"""pydantic's error types for a value that is not a section."""
_MAX_PLACES = 3
"""A name that stands in more places says nothing about the one that was meant."""
_SLIP, _NEAR, _SIMILAR = 0.9, 0.8, 0.65
"""Least similarities (``difflib``) of two spellings: in another section, and in the same."""


def explain_validation_errors(details: Sequence[ErrorDetails], tree: Any) -> list[str]:
    """Return a message for each wrong key of ``tree``, without repetitions.

    Args:
        details: pydantic's errors for ``RunConfig``. A value that fits no member of a union has
            one for each member.
        tree: the plain tree that was checked.
    """
    at_key: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        at_key.setdefault(".".join(_list_written_keys(detail, tree)), []).append(detail)
    messages: list[str] = []
    for path, found in at_key.items():
        whole = next((m for d in found if (m := _explain_value(d, path)) is not None), None)
        messages += [whole] if whole else [_explain_validation_error(d, path) for d in found]
    return list(dict.fromkeys(messages))


def _explain_value(detail: ErrorDetails, path: str) -> str | None:
    """Return a message that shows the right form of a known value, or None.

    Known are values of other trainers, and text in the place of a list.
    """
    given: object = detail.get("input")
    if detail["type"] == "union_tag_invalid" and isinstance(given, dict):
        path, given = f"{path}.kind", given.get("kind")
    if detail["type"] in ("extra_forbidden", "missing"):
        return None
    hint = describe_peer_value(path, given)
    if hint is None and detail["type"] == "list_type" and isinstance(given, str):
        names = [name.strip() for name in given.split(",") if name.strip()]
        hint = f"it is a list: write {path}: [{', '.join(names)}]"
    if hint is None:
        return None
    return f"key {path}: {hint} (given: {given!r})"


def _explain_validation_error(detail: ErrorDetails, path: str) -> str:
    if detail["type"] == "extra_forbidden":
        location = [part for part in detail["loc"] if isinstance(part, str)]
        return f"unknown key {path}; {_find_key_hint(location, path)}"
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


def _find_key_hint(location: list[str], path: str) -> str:
    """Return where the unknown key is, in words.

    Args:
        location: names of keys, and of members of unions.
        path: the keys as they were written.
    """
    name, known = location[-1], _list_known_keys(location)
    if (peer := find_peer_key(path)) is not None:
        return peer.describe()
    elsewhere = list_config_keys()
    if kinds := elsewhere.get(f"adapter.{name}") if location[0] == "adapter" else None:
        return (
            f"it is for kind {', '.join(kinds)}; adapter={{kind: {location[1]}}} on the command "
            "line replaces the whole section"
        )
    if near := difflib.get_close_matches(name, known, n=1, cutoff=_NEAR):
        return f"did you mean {near[0]}?"
    # a sweep repeats keys of other sections
    places = [key for key in elsewhere if not key.startswith("sweep.")]
    same = [key for key in places if key.rpartition(".")[2] == name]
    if 0 < len(same) <= _MAX_PLACES:
        return f"here it is {' or '.join(same)}"
    if near := difflib.get_close_matches(name, known, n=1, cutoff=_SIMILAR):
        return f"did you mean {near[0]}?"
    names = {key.rpartition(".")[2]: key for key in places}
    if near := difflib.get_close_matches(name, names, n=1, cutoff=_SLIP):
        return f"did you mean {names[near[0]]}?"
    return f"known here: {', '.join(known)}"


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
            list_section_classes(m.model_fields[name].annotation)
            for m in models
            if name in m.model_fields
        ]
        models = [model for found in inner for model in found] or models
        tagged = [m for m in models if "kind" in m.model_fields and _read_kind_tag(m) == name]
        models = tagged or models
    return sorted({key for model in models for key in model.model_fields})


@cache
def list_config_keys() -> dict[str, tuple[str, ...]]:
    """Return every key of a configuration, ``train.lr`` or ``data.train[].path``.

    By key, the kinds of its section that have it; empty where the section has no kinds.
    """
    return {key: tuple(kinds) for key, kinds in _collect_keys([RunConfig], "").items()}


def _collect_keys(models: Iterable[type[BaseModel]], prefix: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for model in models:
        kind = _read_kind_tag(model) if "kind" in model.model_fields else None
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            kinds = found.setdefault(key, [])
            if isinstance(kind, str) and prefix.startswith(("adapter.", "data.train[].augment")):
                kinds.append(kind)
            if inner := list_section_classes(field.annotation):
                mark = "[]." if _holds_list(field.annotation) else "."
                for below, its in _collect_keys(inner, f"{key}{mark}").items():
                    found.setdefault(below, []).extend(its)
    return found


def _holds_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list


def _read_kind_tag(model: type[BaseModel]) -> object:
    return model.model_fields["kind"].default


def list_section_classes(annotation: Any) -> list[type[BaseModel]]:
    """Return every section class inside ``Optional``, ``Union``, ``Annotated`` or ``list``
    annotations."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for inner in typing.get_args(annotation) for m in list_section_classes(inner)]
