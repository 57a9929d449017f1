"""Conversion of LLaMA-Factory's data sets, which ``dataset_info.json`` describes by name."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.core.errors import UserError

__all__ = ["DatasetTable"]

_ALPACA_COLUMNS = {
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
    "system": ("system", None),
    "history": ("history", None),
}
"""Column there -> role here, and the column that it is by default."""
_CHAT_COLUMNS = {"messages": ("messages", "conversations"), "system": ("system", None)}
_OWN_TAGS = (
    {"role_tag": "from", "content_tag": "value"},
    {"role_tag": "role", "content_tag": "content"},
)
_OWN_SPEAKERS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class DatasetTable:
    """The entries of ``dataset_info.json`` by name.

    Attributes:
        directory: of the data files, as it is written in the converted file.
        is_found: whether there is such a file.
    """

    directory: Path
    is_found: bool
    entries: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, dataset_dir: str, config_dir: Path) -> Self:
        """Look for ``dataset_dir/dataset_info.json`` from here, then upwards of the file.

        Raises:
            UserError: the file is no JSON object.
        """
        for place in (Path(), config_dir, *config_dir.parents):
            directory = place / dataset_dir
            file = directory / "dataset_info.json"
            if file.is_file():
                return cls(directory, True, _read_table(file))
        return cls(Path(dataset_dir), False)

    def convert_source(
        self, name: str, draft: ConfigDraft, *, is_text: bool, limit: float | None
    ) -> dict[str, Any]:
        """Return the source of the data set ``name``.

        Args:
            is_text: pretraining, on the column of the prompt.
            limit: most records of a source.

        Raises:
            UserError: the data set is of preferences.
        """
        entry = self.entries.get(name)
        if not isinstance(entry, dict):
            where = f"in {self.directory}/dataset_info.json" if self.is_found else "found"
            draft.list_unmatched(
                f"dataset {name}",
                str(self.directory / name),
                f"no description {where}: put the path of its file into data",
            )
            source: dict[str, Any] = {"path": str(self.directory / f"{name}.json"), "name": name}
            return source | ({"limit": limit} if limit else {})
        columns = dict(entry.get("columns", {}))
        preferences = {"chosen", "rejected", "kto_tag"} & set(columns)
        if entry.get("ranking") or preferences:
            raise UserError(
                f"dataset {name} is of preferences ({', '.join(sorted(preferences)) or 'ranking'})"
                ": dist-peft trains on texts and conversations only"
            )
        source = {"path": self._find_path(entry), "name": name}
        if is_text:
            source["format"] = "text"
            _add_columns(source, {"text": columns.pop("prompt", "text")})
        elif entry.get("formatting", "alpaca") == "alpaca":
            source["format"] = "alpaca"
            _add_columns(source, _map_columns(columns, _ALPACA_COLUMNS))
        else:
            source["format"] = "chat"
            _add_columns(source, _map_columns(columns, _CHAT_COLUMNS))
            _list_other_tags(name, entry.get("tags", {}), draft)
        if columns.get("tools") not in (None, "tools") and source["format"] == "chat":
            source.setdefault("columns", {})["tools"] = columns["tools"]
        for kind in _MEDIA:
            draft.list_unmatched(
                f"dataset {name}: {kind}", columns.get(kind), "texts are read only"
            )
        if entry.get("split", "train") != "train":
            source["split"] = entry["split"]
        draft.list_unmatched(
            f"dataset {name}: folder", entry.get("folder"), "the whole set is read"
        )
        counts = [n for n in (limit, entry.get("num_samples")) if n]
        return source | ({"limit": int(min(counts))} if counts else {})

    def _find_path(self, entry: dict[str, Any]) -> str:
        for key in ("hf_hub_url", "ms_hub_url", "script_url"):
            if key in entry:
                subset = entry.get("subset")
                return f"{entry[key]}:{subset}" if subset else str(entry[key])
        return str(self.directory / str(entry.get("file_name", "")))


def _read_table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON file: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{file} must hold an object of data sets")
    return table


def _map_columns(
    columns: dict[str, str], roles: dict[str, tuple[str, str | None]]
) -> dict[str, str]:
    """Take the columns of ``roles`` out of ``columns``; return role -> column."""
    found = {}
    for theirs, (role, default) in roles.items():
        column = columns.pop(theirs, default)
        if column is not None:
            found[role] = column
    return found


def _add_columns(source: dict[str, Any], columns: dict[str, str]) -> None:
    """Set those columns that do not have their role's name."""
    if columns.get("messages") == "conversations":  # read by that name, too
        columns = {role: column for role, column in columns.items() if role != "messages"}
    if other := {role: column for role, column in columns.items() if role != column}:
        source["columns"] = other


def _list_other_tags(name: str, tags: dict[str, str], draft: ConfigDraft) -> None:
    keys = {"role_tag": "from", "content_tag": "value"}
    given = {tag: tags.get(tag, default) for tag, default in keys.items()}
    if given not in _OWN_TAGS:
        draft.list_unmatched(
            f"dataset {name}: tags",
            given,
            "messages have the keys role and content, or from and value",
        )
    for tag, speakers in _OWN_SPEAKERS.items():
        if tags.get(tag, speakers[0]) not in speakers:
            draft.list_unmatched(
                f"dataset {name}: {tag}", tags[tag], f"a speaker is called {' or '.join(speakers)}"
            )
