"""Columns that are read without being mapped, where their names leave one reading.

``{"question": ..., "answer": ...}`` needs no ``columns``: it is read as prompt and completion, and
a note says so. A guess is made only if nothing else of the record can belong to the text: with a
column ``choices`` or ``context`` the prompt would lack it, and the user is asked instead
(``column_hints``).
"""

from typing import Any

from dist_peft.core.config.run import DataSource

__all__ = ["guess_columns"]

_PAIRS = {
    "question": ("answer", "response", "solution", "output"),
    "query": ("response", "answer", "output"),
    "problem": ("solution", "answer", "response"),
    "prompt": ("response", "answer", "output", "solution"),
    "input": ("output", "target", "response"),
    "document": ("summary",),
    "article": ("summary", "highlights"),
    "dialogue": ("summary",),
}
"""Name of the prompt's column -> names of that of the completion, the likeliest first."""

_OUTPUTS = ("response", "answer", "completion")
"""Names of the answer to an ``instruction``."""

_ABOUT_RECORDS = frozenset(
    (
        *("id", "_id", "idx", "index", "uid", "uuid", "key", "qid", "question_id", "prompt_id"),
        *("source", "dataset", "data_source", "url", "split", "meta", "metadata", "info"),
        *("category", "type", "topic", "subject", "task", "domain", "level", "difficulty"),
        *("language", "lang", "license", "author", "date", "timestamp", "title", "tags", "score"),
        *("model", "generator", "token_count", "num_tokens", "length"),
    )
)
"""Columns that describe a record and belong to no text."""


def guess_columns(source: DataSource, record: dict[str, Any]) -> dict[str, str]:
    """Return the ``columns`` by which ``record`` is read; empty if its columns do not tell.

    Args:
        source: nothing is guessed where it has ``columns`` or a ``template``.
        record: the first of the source.
    """
    if source.columns or source.template is not None:
        return {}
    texts = {
        name.lower(): name for name, value in record.items() if isinstance(value, str) and name
    }
    others = {name.lower() for name in record if name not in source.ignore} - _ABOUT_RECORDS
    if source.format in ("auto", "alpaca") and "instruction" in texts:
        answers = [name for name in _OUTPUTS if name in texts]
        if len(answers) == 1 and others <= {"instruction", "input", *answers, "system", "history"}:
            return {"output": texts[answers[0]]} if texts["instruction"] == "instruction" else {}
    if source.format not in ("auto", "completion"):
        return {}
    for prompt, completions in _PAIRS.items():
        answer = next((name for name in completions if name in texts), None)
        if prompt in texts and answer is not None and others == {prompt, answer}:
            return {"prompt": texts[prompt], "completion": texts[answer]}
    return {}
