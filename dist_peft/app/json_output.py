"""``--json``: one JSON document on stdout, whatever happens.

While such a command runs, ``sys.stdout`` is stderr, so that a line of a library or a progress bar
is not in the document. A command that is refused, or fails before it has printed its document,
prints ``{"error": MESSAGE, "exit_code": CODE}`` instead, and the message on stderr as always.
Numbers that are not finite are null, since JSON has none.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

__all__ = ["JSON_VERBS", "print_document", "print_refusal", "reserve_stdout"]

JSON_VERBS = ("validate", "plan", "eval", "merge", "export", "compare", "inspect")
"""Verbs with ``--json`` as one document; ``chat`` prints a line an answer."""

_HELP = {"-h", "--help", "--list"}

_reserved: TextIO | None = None
"""The stdout of a command with ``--json`` that has not printed its document."""


@contextmanager
def reserve_stdout(argv: Sequence[str]) -> Iterator[None]:
    """Keep stdout for ``print_document`` if ``argv`` is one of ``JSON_VERBS`` with ``--json``.

    Args:
        argv: the command line from the verb on.
    """
    global _reserved
    asked = bool(argv) and argv[0] in JSON_VERBS and "--json" in argv
    if not asked or not _HELP.isdisjoint(argv):
        yield
        return
    _reserved = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _reserved = None


def print_document(document: Any, *, indent: int | None = None) -> None:
    """Print the one document of a command; values that JSON does not know are printed as text."""
    global _reserved
    stream, _reserved = _reserved or sys.stdout, None
    text = json.dumps(_replace_nonfinite(document), indent=indent, default=str, allow_nan=False)
    print(text, file=stream, flush=True)


def print_refusal(message: str, code: int) -> None:
    """Print the message of a command that ends with ``code`` without its document, as one.

    Does nothing without ``--json``, and where the document is printed: a report of ``validate``
    has its problems in it.
    """
    if _reserved is not None:
        print_document({"error": message, "exit_code": code})


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_nonfinite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(each) for each in value]
    return value
