"""Conversion of axolotl's lists of data sets: ``datasets``, ``test_datasets``.

An entry has a path and a ``type``, the form of its records. ``completion`` there is running text,
here a prompt with a completion, so that types are never copied by name.
"""

from typing import Any

from dist_peft.app.conversion.config_draft import ConfigDraft

__all__ = ["convert_source_list"]

_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "chat",
    "sharegpt": "chat",
    "completion": "text",
    "pretrain": "text",
}
"""By the part of ``type`` before a dot or colon."""
_FILE_TYPES = ("json", "csv", "parquet", "text", "arrow")
"""Names of readers of ``datasets`` that stand in the place of a path, with ``data_files``."""
_STANDARD = {
    "message_property_mappings": (
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "chat_template": ("tokenizer_default",),
    "field_messages": ("messages", "conversations"),
    "field_tools": ("tools",),
    "field_system": ("system",),
    "message_field_training": ("train", "training", "weight"),
    "conversation": (),
    "ds_type": _FILE_TYPES,
}
"""Keys of an entry and their values that are right here without a setting."""
_ROLES = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt"},
    "system": {"system"},
    "tool": {"tool"},
}


def convert_source_list(entries: Any, key: str, draft: ConfigDraft) -> list[dict[str, Any]]:
    """Return sources for ``data.train`` or ``data.eval``; keys that they lack go into ``draft``.

    Args:
        entries: a list of entries, or one.
        key: the name of the list in the file.
    """
    entries = entries if isinstance(entries, list) else [entries]
    sources: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        options = {"path": entry} if isinstance(entry, str) else dict(entry or {})
        sources += _convert_entry(options, f"{key}[{number}]", draft)
    return sources


def _convert_entry(options: dict[str, Any], where: str, draft: ConfigDraft) -> list[dict[str, Any]]:
    source = _convert_type(options, where, draft)
    path, files = options.pop("path", None), options.pop("data_files", None)
    if (subset := options.pop("name", None)) is not None:
        path = f"{path}:{subset}"
    if (split := options.pop("split", None)) not in (None, "train"):
        source["split"] = split
    for name, value in options.items():
        if name == "roles" and _has_standard_roles(value):
            continue
        if value not in _STANDARD.get(name, ()):
            draft.list_unmatched(f"{where}.{name}", value, "no counterpart of a source")
    if files is None:
        return [{"path": path, **source}]
    names = [files] if isinstance(files, str) else list(files)
    if path not in (None, *_FILE_TYPES):
        draft.list_unmatched(
            f"{where}.data_files", files, f"files of {path}: the whole split is read"
        )
        names = [path]
    return [{"path": name, **source} for name in names]


def _convert_type(options: dict[str, Any], where: str, draft: ConfigDraft) -> dict[str, Any]:
    """Take ``type`` and the columns of it out of ``options``; return the keys of a source."""
    kind = options.pop("type", None)
    if isinstance(kind, dict):
        return _convert_own_type(kind, where, draft)
    if kind is None:
        return {}
    name = str(kind).replace(":", ".").partition(".")[0]
    if name == "gpteacher":
        return {"format": "alpaca", "columns": {"output": "response"}}
    if name not in _FORMATS:
        draft.list_unmatched(f"{where}.type", kind, "the format is detected from the columns")
        return {}
    source: dict[str, Any] = {"format": _FORMATS[name]}
    if name == "completion" or name == "pretrain":
        column = options.pop("field", None) or options.pop("text_column", None)
        if column not in (None, "text"):
            source["columns"] = {"text": column}
    column = options.get("field_messages")
    if source["format"] == "chat" and column not in (None, "messages", "conversations"):
        source["columns"] = {"messages": options.pop("field_messages")}
    return source


def _convert_own_type(kind: dict[str, Any], where: str, draft: ConfigDraft) -> dict[str, Any]:
    """Convert a ``type`` that names columns and the text of the prompt."""
    roles = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
    columns: dict[str, str] = {}
    for role, default in roles.items():
        column = kind.pop(f"field_{role}", None)
        if column not in (None, "", default):
            columns[role] = column
    source: dict[str, Any] = {"format": "alpaca"}
    if columns:
        source["columns"] = columns
    if (template := kind.pop("format", None)) is not None:
        for role in ("instruction", "input"):
            template = template.replace(f"{{{role}}}", f"{{{columns.get(role, role)}}}")
        source["template"] = template
    for name, value in kind.items():
        draft.list_unmatched(f"{where}.type.{name}", value, "a source has one template")
    return source


def _has_standard_roles(roles: Any) -> bool:
    return isinstance(roles, dict) and all(
        isinstance(names, list) and set(names) <= _ROLES.get(role, set())
        for role, names in roles.items()
    )
