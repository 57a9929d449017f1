"""The synonym file of a user: a line for each word.

::

    # lines that start with # and blank lines are skipped
    good: fine, nice, well behaved
    film: movie, picture

Words are found whatever their case. A synonym may be several words.
"""

from collections.abc import Mapping
from pathlib import Path

from dist_peft.core.errors import UserError

__all__ = ["Synonyms", "read_synonym_file"]

Synonyms = Mapping[str, tuple[str, ...]]
"""Synonyms of each word in lower case, in the order of the file, without the word itself."""


def read_synonym_file(path: str, key: str) -> Synonyms:
    """Read the file of ``key``, such as ``data.train[0].augment.synonyms``.

    Raises:
        UserError: it cannot be read, a line is malformed, a word stands twice, or it has no word.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text: {error}; convert it to UTF-8") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{key}: {path} cannot be read: {reason}") from None
    found: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, synonyms = _parse_line(line, f"{key}: {path}, line {number}")
        if word in found:
            raise UserError(
                f"{key}: {path}, line {number}: {word} stands on line {lines[word]} already; join "
                "the two lines"
            )
        found[word], lines[word] = synonyms, number
    if not found:
        raise UserError(f"{key}: {path} holds no line such as 'good: fine, nice'")
    return found


def _parse_line(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    head, colon, rest = line.partition(":")
    word = head.strip().lower()
    if not colon or len(word.split()) != 1:
        raise UserError(f"{where} must be 'word: synonym, synonym' with one word, not {line!r:.60}")
    synonyms = dict.fromkeys(" ".join(each.split()) for each in rest.split(","))
    found = tuple(each for each in synonyms if each and each.lower() != word)
    if not found:
        raise UserError(f"{where}: {word} has no synonym; add one after the colon, or remove it")
    return word, found
