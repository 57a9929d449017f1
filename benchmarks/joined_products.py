"""Low-rank products of query, key and value on a CPU: each alone, and joined over their input.

    python benchmarks/joined_products.py

bfloat16, rank 16, one thread, grouped-query shapes (key and value have a quarter of the rows). The
least CPU milliseconds of each side, which take turns. The frozen products of the three linears in
a step (forward, recomputation, backward, without decodes) are the measure of both.
"""

import time
from collections.abc import Callable

import torch
from common import print_table, write_result
from torch import Tensor

RANK, ROUNDS = 16, 20
SHAPES = ((1024, 512), (1024, 2048), (2048, 4096))
"""Tokens and width."""

Side = Callable[[], object]


def make_sides(tokens: int, width: int) -> dict[str, tuple[Side, Side]]:
    """Return for each product what computes it apart, and joined."""
    x = torch.randn(tokens, width).bfloat16()
    A = [torch.randn(RANK, width) for _ in range(3)]
    v = [torch.randn(tokens, RANK).bfloat16() for _ in range(3)]

    def sum_apart() -> Tensor:
        parts = [own @ factor.bfloat16() for own, factor in zip(v, A, strict=True)]
        return parts[0] + parts[1] + parts[2]

    return {
        "u = x A^T": (
            lambda: [x @ factor.bfloat16().T for factor in A],
            lambda: x @ torch.cat(A).bfloat16().T,
        ),
        "dA = v^T x": (
            lambda: [own.T @ x for own in v],
            lambda: torch.cat(v, 1).T @ x,
        ),
        "dx = sum of v A": (sum_apart, lambda: torch.cat(v, 1) @ torch.cat(A).bfloat16()),
    }


def measure(side: Side) -> float:
    before = time.process_time()
    side()
    return 1e3 * (time.process_time() - before)


def measure_frozen(tokens: int, width: int) -> float:
    """Milliseconds of the frozen products of the three linears in a step."""
    x, weight = torch.randn(tokens, width).bfloat16(), torch.randn(width // 2, width).bfloat16()
    return 3 * 3 * min(measure(lambda: x @ weight.T) for _ in range(5))  # 3/2 of the width's rows


def main() -> None:
    torch.set_num_threads(1)
    records = {}
    for tokens, width in SHAPES:
        sides = make_sides(tokens, width)
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
        for _ in range(ROUNDS):
            for name, pair in sides.items():
                for side, found in zip(pair, times[name], strict=True):
                    found.append(measure(side))
        least = {name: [min(found) for found in pair] for name, pair in times.items()}
        records[f"{tokens} tokens, width {width}"] = {
            **least,
            # forward and recomputation both project
            "saved": sum((2 if name[0] == "u" else 1) * (a - b) for name, (a, b) in least.items()),
            "frozen products": measure_frozen(tokens, width),
        }
    names = [*make_sides(1, 1), "saved", "frozen products"]
    rows = []
    for case, found in records.items():
        cells = [found[name] for name in names]
        rows.append(
            [
                case,
                *(
                    f"{c[0]:.1f} -> {c[1]:.1f}" if isinstance(c, list) else f"{c:.1f}"
                    for c in cells
                ),
            ]
        )
    print_table(["CPU ms, apart -> joined", *names], rows)
    write_result("joined_products", {"rank": RANK, "shapes": records})


if __name__ == "__main__":
    main()
