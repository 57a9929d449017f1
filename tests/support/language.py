"""Print the language of the package: words per 10,000 and lengths of function names.

``python -m tests.support.language [DIRECTORY]`` counts docstrings, comments and messages.
``tests/test_language.py`` enforces the limits below; the other rows are printed only, so that
no text is padded for them. ``docs/decisions/renames.md`` compares the figures with other code.
"""

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# PyTorch and Hugging Face sources do not use these idioms: a search for the usual term misses them.
BANNED_IDIOMS = re.compile(
    r"\b(mend(s|ed|ing)?|learnt|anew|beside|(is|are|was|were|be|been|being) told"
    r"|goes on|go on|went on|nobody)\b",
    re.IGNORECASE,
)
MAX_WHAT_PER_10000 = 5.0
MIN_MEAN_NAME_LENGTH = 12.0
MAX_ONE_WORD_SHARE = 0.35

# Printed rows: a label and the pattern of the words that count.
PRINTED_ROWS = {
    "what": r"what",
    "own": r"own",
    "start(s)": r"starts?",
    "initializ*": r"initiali[sz]\w*",
    "give(s)/gave": r"gives?|gave|given",
    "return(s)": r"returns?",
    "learn(s)": r"learns?",
    "trainable": r"trainable",
    "sequence(s)": r"sequences?",
    "dequant*": r"dequant\w*",
    "shard*": r"(un|re)?shard\w*",
}


@dataclass(frozen=True)
class Phrase:
    """A docstring, comment or message: its text and the place (``path:line``)."""

    text: str
    place: str


def find_python_files(root: Path) -> list[Path]:
    """Return the Python files below ``root`` in order."""
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def iterate_phrases(path: Path) -> Iterator[Phrase]:
    """Yield each comment and each string that holds a space: docstrings and messages."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Phrase(token.string.lstrip("#! "), f"{path}:{token.start[0]}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield Phrase(node.value, f"{path}:{node.lineno}")


def list_function_names(path: Path) -> list[str]:
    """Return the names of functions and methods but dunders, without leading underscores."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [
        node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)
    ]
    return [
        name.strip("_")
        for name in names
        if not (name.startswith("__") and name.endswith("__")) and name.strip("_")
    ]


@dataclass(frozen=True)
class LanguageTable:
    """Measured language of a code base. ``idioms`` lists each banned idiom with its place."""

    words: int
    rates: dict[str, float]
    idioms: list[str]
    names: list[str]

    @property
    def mean_name_length(self) -> float:
        """Mean length of function names in characters."""
        return sum(map(len, self.names)) / max(1, len(self.names))

    @property
    def one_word_share(self) -> float:
        """Share of function names without an underscore inside, 0 to 1."""
        return sum("_" not in name for name in self.names) / max(1, len(self.names))

    def format_rows(self) -> str:
        """Return the table as lines of text."""
        rows = [f"{label:>16} {rate:7.1f}" for label, rate in self.rates.items()]
        rows.append(f"{'banned idioms':>16} {10_000 * len(self.idioms) / max(1, self.words):7.1f}")
        header = f"words per 10,000 of {self.words} words of docstrings, comments and messages"
        names = f"{len(self.names)} functions: mean length {self.mean_name_length:.1f}"
        share = f"one word {100 * self.one_word_share:.0f} %"
        return "\n".join([header, *rows, f"{names}, {share}"])


def measure_language(files: list[Path]) -> LanguageTable:
    """Count words, idioms and names over ``files``."""
    words: Counter[str] = Counter()
    idioms, names = [], []
    for path in files:
        names += list_function_names(path)
        for phrase in iterate_phrases(path):
            words.update(re.findall(r"[a-z']+", phrase.text.lower()))
            idioms += [
                f"{phrase.place}: {match.group(0)}" for match in BANNED_IDIOMS.finditer(phrase.text)
            ]
    total = sum(words.values())
    rates = {
        label: 10_000
        * sum(n for word, n in words.items() if re.fullmatch(pattern, word))
        / max(1, total)
        for label, pattern in PRINTED_ROWS.items()
    }
    return LanguageTable(words=total, rates=rates, idioms=idioms, names=names)


def list_what_places(files: list[Path]) -> list[str]:
    """Return ``path:line: text around it`` for each use of "what", to rewrite them."""
    places = []
    for phrase in (phrase for path in files for phrase in iterate_phrases(path)):
        for match in re.finditer(r"\bwhat\b", phrase.text, re.IGNORECASE):
            around = phrase.text[max(0, match.start() - 50) : match.end() + 60]
            places.append(f"{phrase.place}: {' '.join(around.split())}")
    return places


def main() -> None:
    """Print the table of a directory; with ``--places`` each banned idiom and each "what"."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path(__file__).parents[2] / "dist_peft"
    )
    parser.add_argument("--places", action="store_true")
    options = parser.parse_args()
    files = find_python_files(options.directory)
    table = measure_language(files)
    print(table.format_rows())
    if options.places:
        print("\n".join([*table.idioms, *list_what_places(files)]))


if __name__ == "__main__":
    main()
