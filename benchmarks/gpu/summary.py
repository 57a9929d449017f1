"""Print the results of ``first_half_hour.sh`` next to the targets.

Targets are for an H100 SXM with 80 GB unless the row says otherwise, NF4, packed rows of 2048
tokens.
"""

import json
from typing import Any

from common import print_table
from gpu_common import parse_arguments

GB = 10**9
TARGETS = (
    ("8B, tokens/s", "shape-8b", "tokens_per_s", "more than 9400 (H200: 8400)"),
    ("14B, tokens/s", "shape-14b", "tokens_per_s", "more than 6100"),
    ("32B, tokens/s", "shape-32b", "tokens_per_s", "more than 2800"),
    ("65B, peak GB", "shape-65b", "peak_allocated", "less than 41"),
    ("70B, peak GB", "shape-70b", "peak_allocated", "that of its plan"),
)


def main() -> None:
    args = parse_arguments(__doc__)
    found: dict[str, Any] = {
        file.stem: json.loads(file.read_text())["result"]
        for file in sorted(args.out.glob("*.json"))
    }
    if args.dry_run:
        print("\ntiny sizes on the CPU: the figures say nothing about a GPU")
    rows = []
    for label, name, key, target in TARGETS:
        value = found.get(name, {}).get("sides", {}).get("nf4", {}).get(key)
        scale = GB if key == "peak_allocated" else 1
        rows.append([label, "-" if value is None else f"{value / scale:.1f}", target])
    print_table(["quantity", "measured", "target"], rows)
    rows = []
    for name, result in found.items():
        for side, own in result.get("sides", {}).items():
            planned = own.get("plan", {}).get("allocated")
            sizes = [own.get("peak_allocated"), own.get("peak_reserved"), planned]
            shown = ["-" if size is None else f"{size / GB:.2f}" for size in sizes]
            speed = own.get("tokens_per_s")
            rows.append([name, side, "-" if speed is None else f"{speed:.0f}", *shown])
    if rows:
        print()
        header = ["model", "side", "tokens/s", "allocated GB", "reserved GB", "planned GB"]
        print_table(header, rows)
    for name, result in found.items():
        for failure in result.get("failures", ()):
            print(f"FAILED {name}: {failure}")


if __name__ == "__main__":
    main()
