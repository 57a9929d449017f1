"""Run commands with another copy of the package, in a process that has the libraries already.

The copy is a directory with ``dist_peft/``. A rank of ``tests.support.dist`` is forked with all
libraries imported; here its modules of this package are dropped, and those of the copy imported.
"""

import sys
from pathlib import Path
from typing import Any

from tests.support.dist import call_in_process

__all__ = ["run_commands_in_package"]


def run_commands_in_package(root: Path, *commands: list[str], timeout: float = 180) -> None:
    """Run command lines of ``dist-peft`` one after another with the package in ``root``.

    The first that ends with another code than 0 is an AssertionError with its number.
    """
    call_in_process(_run_commands, str(root), commands, timeout=timeout)


def _run_commands(root: str, commands: Any) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "dist_peft"]:
        del sys.modules[name]
    sys.path.insert(0, root)
    from dist_peft.app import cli

    assert str(cli.__file__).startswith(root), cli.__file__
    for argv in commands:
        code = cli.main(argv)
        assert code == 0, f"dist-peft {' '.join(argv)} ended with {code}"
