"""``python -m tests.support.lint_imports``: import-linter as a module, with its exit code."""

import sys

from importlinter.cli import lint_imports

if __name__ == "__main__":
    sys.exit(lint_imports())
