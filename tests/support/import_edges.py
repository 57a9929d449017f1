"""Count the imports between the parts of a package, and find upward ones and cycles.

``python -m tests.support.import_edges [PACKAGE] [--root CHECKOUT] [--list]``: PACKAGE is a folder
of ``dist_peft`` (``adapters`` by default). A *part* is a folder or a module that lies directly in
it; an *edge* is one part that imports another, counted once. The table also counts edges between
files.
"""

import argparse
import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

Edge = tuple[str, str]


@dataclass(frozen=True)
class ImportEdges:
    """Imports inside a package.

    Attributes:
        parts: folders and modules that lie directly in it.
        between_parts: (importing part, imported part).
        files: all modules, as paths below the package with dots.
        between_files: (importing module, imported module).
    """

    parts: frozenset[str]
    between_parts: frozenset[Edge]
    files: frozenset[str]
    between_files: frozenset[Edge]

    def list_levels(self) -> list[list[str]]:
        """Return the parts by level: each imports lower levels only.

        Raises:
            ValueError: there is a cycle, which the message names.
        """
        left, levels, placed = set(self.parts), [], set()
        while left:
            level = {p for p in left if {b for a, b in self.between_parts if a == p} <= placed}
            if not level:
                raise ValueError(f"import cycle among {', '.join(sorted(left))}")
            levels.append(sorted(level))
            placed |= level
            left -= level
        return levels


def find_import_edges(package: str, root: Path = ROOT) -> ImportEdges:
    """Read every module of ``dist_peft.PACKAGE`` below ``root``; nothing is imported."""
    folder = root / "dist_peft" / package
    prefix = f"dist_peft.{package.replace('/', '.')}."
    paths = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    }
    edges = {
        (name, target)
        for name, path in paths.items()
        for target in _list_imported(path, prefix)
        if target in paths and target != name
    }
    parts = frozenset(name.split(".")[0] for name in paths)
    between = {(a.split(".")[0], b.split(".")[0]) for a, b in edges}
    return ImportEdges(
        parts, frozenset((a, b) for a, b in between if a != b), frozenset(paths), frozenset(edges)
    )


def _list_imported(path: Path, prefix: str) -> Iterable[str]:
    """Yield modules below ``prefix`` that a file may import; names that are none are harmless."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(prefix) for name in names if name.startswith(prefix))


def main() -> None:
    """Print the counts, the levels or the cycle, and with ``--list`` each edge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", nargs="?", default="adapters")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    found = find_import_edges(options.package, options.root)
    print(
        f"{options.package}: {len(found.parts)} parts, {len(found.between_parts)} edges; "
        f"{len(found.files)} files, {len(found.between_files)} edges"
    )
    try:
        print("\n".join(f"level {n}: {', '.join(p)}" for n, p in enumerate(found.list_levels())))
    except ValueError as error:
        print(error)
    if options.list:
        print("\n".join(f"{a} -> {b}" for a, b in sorted(found.between_parts)))


if __name__ == "__main__":
    main()
