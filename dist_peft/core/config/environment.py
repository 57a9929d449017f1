"""Values of a configuration that come from the environment: ``${oc.env:NAME}``.

A run uses their values and stores the references, which a resume resolves again: ``config.yaml``,
``report.html`` and checkpoints hold no value of the environment. Two kinds of values are stored as
they are: paths from variables whose names do not sound like secrets (``${oc.env:DATA}/a.jsonl``),
since merges and exports follow them in another environment; and nothing else.

A run directory may be a stranger's. Where its ``config.yaml`` is read for a merge or an export,
references are resolved only as far as a value cannot leave this machine: a path must exist here, a
number is a number, and any other text stays unresolved, since nothing there needs it.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from dist_peft.core.redaction import is_secret_name, redact_text, register_secret

__all__ = [
    "Reference",
    "find_references",
    "has_other_reference",
    "is_path_key",
    "locate_references",
    "resolve_stored_references",
    "store_references",
]

_PATH_KEY = re.compile(
    r"base\.path|data\.(train|eval)(\[\d+\])?(\.path)?|data\.cache_dir|engine\.deepspeed_config"
    r"|adapter\.adapters\[\d+\]\.path|save\.dir|resume"
)
_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)")
_OTHER_REFERENCE = re.compile(r"(?<!\\)\$\{(?!oc\.env:)")
_NUMBER = re.compile(r"[-+]?[\d.]+([eE][-+]?\d+)?|true|false|null", re.IGNORECASE)


class Reference(str):
    """The text of a reference, not to be escaped."""

    __slots__ = ()


def find_references(tree: Any) -> dict[str, tuple[Reference, object]]:
    """Return, by key, each value of ``tree`` that is stored as a reference, and the value itself.

    References to other keys are resolved, so that the text refers to the environment alone.

    Args:
        tree: of OmegaConf, not resolved.

    Raises:
        OmegaConfBaseException: a reference is wrong, or its variable is not set.
    """
    values = flatten_values(OmegaConf.to_container(tree, resolve=True))
    with _keep_references():
        texts = flatten_values(OmegaConf.to_container(tree, resolve=True))
    found: dict[str, tuple[Reference, object]] = {}
    for key, value in values.items():
        text = texts.get(key)
        if text == value or not isinstance(text, str):
            continue
        names = _VARIABLE.findall(text)
        if is_path_key(key) and not any(map(is_secret_name, names)):
            continue
        if isinstance(value, str):
            register_secret(value)
            for name in names:
                register_secret(os.environ.get(name, ""))
        found[key] = (Reference(text), value)
    return found


def flatten_values(tree: Any, prefix: str = "") -> dict[str, object]:
    """Return the leaves of ``tree`` by key; unlike ``flatten_tree`` also those of plain lists."""
    if isinstance(tree, dict):
        parts = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in tree.items()]
    elif isinstance(tree, list):
        parts = [(f"{prefix}[{number}]", inner) for number, inner in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for key, inner in parts for k, v in flatten_values(inner, key).items()}


@contextmanager
def _keep_references() -> Iterator[None]:
    """Resolve ``${oc.env:NAME}`` to its own text."""

    def keep(name: str, default: Any = oc.env) -> str:  # a default may be null
        if default is oc.env:
            return f"${{oc.env:{name}}}"
        return f"${{oc.env:{name},{'null' if default is None else default}}}"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # omegaconf 2.4 has another name for it, 2.3 has not
        OmegaConf.register_new_resolver("oc.env", keep, replace=True)
        try:
            yield
        finally:
            OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def is_path_key(key: str) -> bool:
    """Return whether ``key`` holds a path, or a hub id in its place."""
    return _PATH_KEY.fullmatch(key) is not None


def locate_references(
    found: Mapping[str, tuple[Reference, object]], tree: Mapping[str, Any]
) -> dict[str, tuple[Reference, object]]:
    """Return ``found`` by the keys of the checked tree, whose short forms are written out.

    Args:
        tree: the checked configuration as plain JSON.
    """
    leaves = flatten_values(tree)
    located: dict[str, tuple[Reference, object]] = {}
    for key, value in leaves.items():
        for written in (key, re.sub(r"\.path$", "", key), re.sub(r"\[0\](\.path)?$", "", key)):
            if written in found:
                located[key] = (found[written][0], value)
    return located


def store_references(
    tree: Any,
    located: Mapping[str, tuple[Reference, object]],
    *,
    with_digests: bool = False,
    key: str = "",
) -> Any:
    """Return ``tree`` with references in the place of values, and known secrets redacted.

    Args:
        tree: a configuration as plain JSON. Where it has another value by now, that stays.
        located: of ``locate_references``.
        with_digests: for comparisons: a reference to a text is followed by a digest of its value,
            and a number stays.
    """
    if isinstance(tree, dict):
        return {
            name: store_references(
                inner, located, with_digests=with_digests, key=f"{key}.{name}" if key else name
            )
            for name, inner in tree.items()
        }
    if isinstance(tree, list):
        return [
            store_references(inner, located, with_digests=with_digests, key=f"{key}[{number}]")
            for number, inner in enumerate(tree)
        ]
    reference, value = located.get(key, (None, None))
    if reference is None or value != tree:
        # a task's configuration has its source at another place
        same = [r for r, v in located.values() if isinstance(v, str) and len(v) > 3 and v == tree]
        reference = same[0] if same else None
    if reference is None:
        return redact_text(tree) if isinstance(tree, str) else tree
    if not with_digests:
        return reference
    if not isinstance(tree, str):
        return tree
    digest = hashlib.sha256(f"{reference}\0{tree}".encode()).hexdigest()[:16]
    return f"{reference} (digest {digest})"


# -- a run's own configuration -----------------------------------------------------------------


def has_other_reference(value: str) -> bool:
    """Return whether ``value`` refers to more than the environment, which no run has written."""
    return _OTHER_REFERENCE.search(value) is not None


def resolve_stored_references(tree: Any) -> tuple[Any, str | None]:
    """Resolve the references of a ``config.yaml`` that may be a stranger's.

    Returns:
        The plain tree, and the key of a path that does not exist here, which is not resolved.
    """
    with _keep_references():
        plain = OmegaConf.to_container(tree, resolve=True)
    refused: str | None = None

    def resolve(node: Any, key: str) -> Any:
        nonlocal refused
        if isinstance(node, dict):
            return {n: resolve(v, f"{key}.{n}" if key else str(n)) for n, v in node.items()}
        if isinstance(node, list):
            return [resolve(v, f"{key}[{n}]") for n, v in enumerate(node)]
        if not isinstance(node, str) or not _is_reference(tree, key):
            return node
        value = _resolve_alone(node)
        if is_path_key(key):
            if isinstance(value, str) and os.path.exists(os.path.expanduser(value)):
                return value
            refused = refused or key
            return node
        is_plain = value is None or isinstance(value, bool | int | float)
        return value if is_plain or _NUMBER.fullmatch(str(value)) else node

    return resolve(plain, ""), refused


def _is_reference(tree: Any, key: str) -> bool:
    parent, _, name = re.sub(r"\[(\d+)\]", r".\1", key).rpartition(".")
    node = OmegaConf.select(tree, parent) if parent else tree
    return OmegaConf.is_interpolation(node, int(name) if OmegaConf.is_list(node) else name)


def _resolve_alone(text: str) -> object:
    try:
        return OmegaConf.create({"value": text})["value"]
    except OmegaConfBaseException:  # a variable that is not set
        return text
