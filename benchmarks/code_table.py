"""Measures of the source code of a checkout, to see where it grows.

    python benchmarks/code_table.py [CHECKOUT] [--package NAME] [--tests NAME]

Prints a Markdown table: files and lines, function lengths, annotations, docstrings, comments,
function-local imports, cyclomatic complexity, and lines of tests a line of source.
Nothing of the checkout is imported, so any revision can be measured (``git worktree add``).
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class SourceTable:
    """What is counted over the files of a package."""

    file_lines: list[int] = field(default_factory=list)
    function_lines: list[int] = field(default_factory=list)
    annotated: list[bool] = field(default_factory=list)
    module_docstrings: list[bool] = field(default_factory=list)
    docstring_lines: int = 0
    comment_lines: int = 0
    local_imports: int = 0
    complexities: list[int] = field(default_factory=list)

    def add_file(self, source: str) -> None:
        """Count one file."""
        tree = ast.parse(source)
        self.file_lines.append(source.count("\n"))
        self.module_docstrings.append(ast.get_docstring(tree) is not None)
        self.complexities += map(count_complexity, list_outer_functions(tree))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comment_lines += sum(
            token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            for token in tokens
        )
        self.docstring_lines += sum(map(_count_docstring_lines, ast.walk(tree)))
        functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
        self.function_lines += [(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]
        self.annotated += [_is_annotated(function) for function in functions]
        self.local_imports += len(
            {
                node.lineno
                for function in functions
                for node in ast.walk(function)
                if isinstance(node, ast.Import | ast.ImportFrom)
            }
        )

    def list_rows(self, test_lines: int) -> Iterator[tuple[str, str]]:
        """Yield (measure, value)."""
        lines, lengths = sum(self.file_lines), sorted(self.function_lines)
        yield "files", f"{len(self.file_lines)}"
        yield "lines", f"{lines:,}"
        for limit in (400, 300):
            yield f"files > {limit} lines", f"{sum(n > limit for n in self.file_lines)}"
        yield "functions", f"{len(lengths):,}"
        yield "function lines median/p95/max", _format_distribution(lengths)
        yield "functions > 60 lines", f"{sum(n > 60 for n in lengths)}"
        yield "annotated functions", _format_share(self.annotated)
        yield "modules with docstring", _format_share(self.module_docstrings)
        yield "docstring lines", f"{100 * self.docstring_lines / max(1, lines):.0f} %"
        yield "comment lines", f"{100 * self.comment_lines / max(1, lines):.1f} %"
        yield "function-local imports", f"{self.local_imports}"
        if found := sorted(self.complexities):
            p95, above = found[int(0.95 * len(found))], sum(n > 10 for n in found)
            yield "complexity mean/p95/max", f"{mean(found):.2f}/{p95}/{found[-1]}"
            yield "complexity > 10", f"{above} of {len(found):,} ({100 * above / len(found):.1f} %)"
        yield "lines of tests : source", f"{test_lines / max(1, lines):.2f}"


def _format_distribution(ordered: list[int]) -> str:
    if not ordered:
        return "-"
    return f"{median(ordered):.0f}/{ordered[int(0.95 * len(ordered))]}/{ordered[-1]}"


def _format_share(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / max(1, len(flags)):.0f} %"


def _count_docstring_lines(node: ast.AST) -> int:
    """Lines of strings that stand alone: docstrings, and those of constants and attributes."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return 0
    is_text = isinstance(node.value.value, str)
    return (node.end_lineno or node.lineno) - node.lineno + 1 if is_text else 0


def _is_annotated(function: Function) -> bool:
    """Whether every parameter but ``self`` and ``cls``, and the result have a type."""
    spec = function.args
    parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    named = [p for p in parameters if p is not None and p.arg not in ("self", "cls")]
    return function.returns is not None and all(p.annotation is not None for p in named)


def find_python_files(directory: Path) -> list[Path]:
    """Return the Python files below ``directory`` in order."""
    return sorted(p for p in directory.rglob("*.py") if "__pycache__" not in p.parts)


def count_complexity(node: ast.AST) -> int:
    """Return 1 + the decisions in a function, and in the functions inside it.

    As radon counts McCabe's number: branches, loops and their ``else``, handlers, cases but ``_``,
    asserts, operands of ``and`` and ``or`` but the first, comprehensions and their conditions.
    """
    total = 1
    for child in ast.walk(node):
        match child:
            case ast.If() | ast.IfExp() | ast.Assert():
                total += 1
            case ast.For() | ast.AsyncFor() | ast.While():
                total += 1 + bool(child.orelse)
            case ast.Try() | ast.TryStar():
                total += len(child.handlers) + bool(child.orelse)
            case ast.BoolOp():
                total += len(child.values) - 1
            case ast.comprehension():
                total += 1 + len(child.ifs)
            case ast.Match():
                total += sum(not _is_wildcard(case) for case in child.cases)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if child is not node:
                total += 1
    return total


def _is_wildcard(case: ast.match_case) -> bool:
    return isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None


def list_outer_functions(tree: ast.AST) -> Iterator[Function]:
    """Yield functions and methods, but not those inside a function."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, Function):
            yield child
        else:
            yield from list_outer_functions(child)


def measure_package(directory: Path) -> SourceTable:
    """Count every file of a package."""
    table = SourceTable()
    for path in find_python_files(directory):
        table.add_file(path.read_text())
    return table


def main() -> None:
    """Print the table of a checkout."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=root)
    parser.add_argument("--package", default="dist_peft")
    parser.add_argument("--tests", default="tests")
    options = parser.parse_args()
    tests = find_python_files(options.checkout / options.tests)
    test_lines = sum(path.read_text().count("\n") for path in tests)
    print("| measure | value |\n|---|---|")
    for row in measure_package(options.checkout / options.package).list_rows(test_lines):
        print(f"| {row[0]} | {row[1]} |")


if __name__ == "__main__":
    main()
