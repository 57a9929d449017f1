"""Pictures of HTML pages at the width of a desk and of a phone, to be looked at; headless Chromium.

``python benchmarks/screenshots.py runs/mine/report.html compare.html --out DIRECTORY``

Needs ``chromium`` on PATH (``apt-get install chromium``).
"""

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["list_commands"]

SIZES = {"desk": (1280, 2600), "phone": (390, 4200)}


def list_commands(pages: Sequence[Path], out: Path) -> list[list[str]]:
    """Return the command of each picture, ``PAGE-desk.png`` and ``PAGE-phone.png``."""
    return [
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--window-size={width},{height}",
            f"--screenshot={out.resolve() / f'{page.stem}-{name}.png'}",
            page.resolve().as_uri(),
        ]
        for page in pages
        for name, (width, height) in SIZES.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args(arguments)
    if shutil.which("chromium") is None:
        parser.error("chromium is not installed: apt-get install chromium")
    args.out.mkdir(parents=True, exist_ok=True)
    for command in list_commands(args.pages, args.out):
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        print(command[-2].partition("=")[2])


if __name__ == "__main__":
    main()
