"""Suggested settings of a source whose records match no format by their column names."""

from pathlib import Path
from typing import Any

from dist_peft.core.config.run import DataSource
from dist_peft.data.readers import is_table

__all__ = [
    "list_nested_columns",
    "suggest_chosen_columns",
    "suggest_column_names",
    "suggest_columns",
]

_PROMPTS = (
    "prompt",
    "question",
    "query",
    "problem",
    "instruction",
    "source",
    "document",
    "article",
)
_ANSWERS = (
    "completion",
    "answer",
    "response",
    "output",
    "solution",
    "target",
    "summary",
    "highlights",
)
_TEXTS = ("content", "story", "document", "article", "body", "page", "raw_content")
_LABELS = ("label", "labels", "class", "category")


def suggest_column_names(file: str, source: DataSource, key: str) -> str:
    """Return a suggestion for a table that may lack a header line; empty for other files."""
    if source.column_names or not is_table(Path(file)):
        return ""
    return f"; if the file has no header line, name its columns by {key}.column_names"


def suggest_columns(record: dict[str, Any], key: str) -> str:
    """Return a suggestion of settings, by the names of the columns of ``record``.

    Args:
        key: configuration key of the source, such as ``data.train[0]``.
    """
    texts = [name for name, value in record.items() if isinstance(value, str) and name]
    prompt, answer = _find_first_column(_PROMPTS, texts), _find_first_column(_ANSWERS, texts)
    whole = _find_first_column(_TEXTS, texts)
    if "chosen" in record:
        hint = f"To train on the chosen answers set {key}.columns: {suggest_chosen_columns(record)}"
    elif "instruction" in record and answer:
        hint = f"Map it: {key}.columns: {{output: {answer}}}"
    elif prompt and answer:
        hint = f"Map them: {key}.columns: {{prompt: {prompt}, completion: {answer}}}"
    elif "instruction" in record:
        hint = f"Map the answer: {key}.columns: {{output: a_column}}"
    elif whole and not prompt:
        hint = f"Map it: {key}.columns: {{text: {whole}}}"
    else:
        hint = f"Map them, for example {key}.columns: {{prompt: a_column, completion: a_column}}"
    nested = _find_nested_column(record)
    if nested:
        hint += f"; a column inside another is written {nested}"
    label = _find_first_column(_LABELS, list(record))
    if label and not (prompt and answer):
        hint += (
            f"; to train a classifier on {label} set {key}.format: classification, with labels "
            "and base.head: classifier"
        )
    return hint


def suggest_chosen_columns(record: dict[str, Any]) -> str:
    """Return the ``columns`` setting that reads preference data as their chosen answers."""
    chosen = record.get("chosen")
    turns = next((n for n in ("messages", "conversations") if n in record), None)
    if isinstance(chosen, list) and chosen and _get_speaker(chosen[0]) not in ("assistant", "gpt"):
        return "{messages: chosen}"
    if turns is not None:
        return f"{{prompt: {turns}, completion: chosen}}"
    if "prompt" in record:
        return "{prompt: prompt, completion: chosen}"
    if "instruction" in record:
        return "{output: chosen}"
    if prompt := _find_first_column(_PROMPTS, list(record)):
        return f"{{prompt: {prompt}, completion: chosen}}"
    return "{messages: chosen}" if isinstance(chosen, list) else "{text: chosen}"


def _get_speaker(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _find_first_column(wanted: tuple[str, ...], names: list[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _find_nested_column(record: dict[str, Any]) -> str | None:
    """Return the path of a text inside a column of ``record``, such as ``instances.0.output``."""
    nested = list_nested_columns(record)
    answers = [path for path in nested if path.rpartition(".")[2] in _ANSWERS]
    return next(iter([*answers, *nested]), None)


def list_nested_columns(record: dict[str, Any]) -> list[str]:
    """Return the paths of texts inside columns of ``record``, as ``columns`` names them."""
    found = []
    for name, value in record.items():
        inner, path = value, name
        if isinstance(inner, list) and inner:
            inner, path = inner[0], f"{path}.0"
        if isinstance(inner, dict):
            found += [f"{path}.{key}" for key, text in inner.items() if isinstance(text, str)]
    return found
