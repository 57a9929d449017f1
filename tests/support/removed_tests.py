"""Test functions that an earlier revision has more of, by name, than the present tree.

    python -m tests.support.removed_tests REVISION

Prints each with the new test whose body is most like its own, and how like: 1.00 is a rename.
"""

import argparse
import ast
import difflib
import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class TestFunction:
    """A test: its name, its file below the repository, and the words of its body."""

    __test__ = False
    name: str
    path: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class RemovedTest:
    """A test without its name in the present tree, and the new test that is most like it."""

    old: TestFunction
    new: TestFunction | None
    likeness: float


def iterate_tests(path: str, source: str) -> Iterator[TestFunction]:
    """Yield the test functions and methods of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            body = ast.unparse(ast.Module(body=node.body, type_ignores=[]))
            yield TestFunction(node.name, path, tuple(body.split()))


def list_tests_of_revision(revision: str) -> list[TestFunction]:
    """Return the tests that ``git`` has of ``revision``."""
    command = ["git", "archive", revision, "tests"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    found: list[TestFunction] = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            file = files.extractfile(member) if member.name.endswith(".py") else None
            if file is not None:
                found += iterate_tests(member.name, file.read().decode())
    return found


def list_tests_of_tree(root: Path = ROOT) -> list[TestFunction]:
    """Return the tests of the files below ``root/tests``."""
    paths = sorted((root / "tests").rglob("*.py"))
    return [t for p in paths for t in iterate_tests(str(p.relative_to(root)), p.read_text())]


def find_removed_tests(old: list[TestFunction], new: list[TestFunction]) -> list[RemovedTest]:
    """Return the tests whose names ``new`` has less often, each with the most similar new one."""
    counts, now = Counter(t.name for t in old), Counter(t.name for t in new)
    lost = counts - now
    candidates = [test for test in new if now[test.name] > counts[test.name]]
    removed = []
    for name, number in lost.items():
        kept = [test for test in new if test.name == name]
        tests = [test for test in old if test.name == name]
        tests.sort(key=lambda test: _find_most_similar(test, kept)[1])
        for test in tests[:number]:
            removed.append(RemovedTest(test, *_find_most_similar(test, candidates)))
    return removed


def _find_most_similar(
    test: TestFunction, candidates: list[TestFunction]
) -> tuple[TestFunction | None, float]:
    """The candidate with the most similar body, and the similarity, 0 to 1."""
    matcher = difflib.SequenceMatcher(b=test.words, autojunk=False)
    best, likeness = None, 0.0
    for candidate in candidates:
        matcher.set_seq1(candidate.words)
        if matcher.real_quick_ratio() <= likeness or matcher.quick_ratio() <= likeness:
            continue  # two bounds that are cheaper than the ratio itself
        if (ratio := matcher.ratio()) > likeness:
            best, likeness = candidate, ratio
    return best, likeness


def main() -> None:
    """Print the removed names of a revision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    old, new = list_tests_of_revision(parser.parse_args().revision), list_tests_of_tree()
    removed = find_removed_tests(old, new)
    print(f"{len(old)} tests then, {len(new)} now; {len(removed)} are no more")
    for found in sorted(removed, key=lambda found: found.likeness):
        target = f"{found.new.path}::{found.new.name}" if found.new else "-"
        print(f"{found.likeness:.2f}  {found.old.path}::{found.old.name} -> {target}")


if __name__ == "__main__":
    main()
