"""A sweep of K adapters against K runs: CPU seconds in one process, time and bytes on slow links.

    python benchmarks/sweep.py [--points 8] [--links 1gbit] [--tokens 32 128] [--steps 3]

One process: a step of the sweep, which is an optimizer step of each of its K adapters, against K
times a step of one run, in CPU seconds. Two nodes: network namespaces with a rank each (see
``netns.py``; needs root, ip and tc) and FSDP2, in seconds and in bytes. Both sides take turns step
by step in the same processes, so that whatever else the machine does meets both. Training of both
is the project's own (``sweep_rank.py``); the base is NF4, adapters are LoRA on all linears.

The seconds of a run's start (imports, loading and quantizing the base), of which a sweep has one
and K runs have K, are not counted.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from common import MIB, RESULTS, make_base, print_table, write_result
from netns import UNSHAPED, Network
from wire import TRANSFER_SECONDS, Ranks
from wire_rank import FORMS

MEASURES = ("seconds", "cpu_seconds", "sent", "gathered", "peak")


class ThisHost:
    """In the place of a ``Network``: one process."""

    names = ("here",)
    addresses = ("127.0.0.1",)

    def command(self, host: int, *command: str) -> list[str]:
        return list(command)


def summarize(
    steps: Sequence[Sequence[dict[str, dict[str, float]]]], points: int
) -> dict[str, Any]:
    """Medians over steps of the slowest or busiest rank; ratios are medians over turns."""
    found: dict[str, Any] = {}
    most: dict[str, dict[str, list[float]]] = {}
    for side in ("alone", "sweep"):
        most[side] = {m: [max(rank[side][m] for rank in step) for step in steps] for m in MEASURES}
        found[side] = {m: statistics.median(values) for m, values in most[side].items()}
    for measure in ("seconds", "cpu_seconds", "sent", "gathered"):
        pairs = zip(most["sweep"][measure], most["alone"][measure], strict=True)
        ratios = [sweep / (points * alone) for sweep, alone in pairs if alone]
        found[f"{measure}_ratio"] = statistics.median(ratios) if ratios else None
        found[f"{measure}_ratios"] = [round(ratio, 3) for ratio in ratios]
    fastest = [min(most[side]["seconds"]) for side in ("sweep", "alone")]
    found["fastest_ratio"] = fastest[0] / (points * fastest[1])
    return found


def visit(ranks: Ranks, steps: int) -> list[list[dict[str, dict[str, float]]]]:
    """Timed steps, after one that is left out; by step, then by rank."""
    by_rank = ranks.ask(steps=steps + 1)
    return [[of_rank[i] for of_rank in by_rank] for i in range(1, steps + 1)]


def make_settings(
    args: argparse.Namespace, directory: Path, tokens: int, form: str = "nf4"
) -> dict[str, Any]:
    return {
        "form": form,
        "base": str(directory / "base"),
        "data": str(directory / "text.txt"),
        "cache": str(directory / f"cache{tokens}"),
        "dtype": args.dtype,
        "seq_len": tokens,
        "batch": 1,
        "r": args.r,
        "points": args.points,
    }


def run_one_process(args: argparse.Namespace, directory: Path, tokens: int) -> dict[str, Any]:
    network = cast(Network, ThisHost())
    settings = make_settings(args, directory, tokens)
    with Ranks(network, settings, directory, "sweep_rank.py") as ranks:
        found = summarize(visit(ranks, args.steps), args.points)
    return {"nodes": 1, "form": "nf4", "link": "-", "tokens": tokens, **found}


def run_two_nodes(args: argparse.Namespace, directory: Path, form: str) -> list[dict[str, Any]]:
    results, tokens = [], args.wire_tokens
    settings = make_settings(args, directory, tokens, form)
    with Network(2) as network, Ranks(network, settings, directory, "sweep_rank.py") as ranks:
        for link in (UNSHAPED, *args.links):
            network.shape(link)
            rate = ranks.ask(transfer=TRANSFER_SECONDS)[1]
            found = summarize(visit(ranks, args.steps), args.points)
            about = {"nodes": 2, "form": form, "link": link, "tcp_gbit_s": rate, "tokens": tokens}
            results.append({**about, **found})
    return results


HEADER = (
    "nodes",
    "base",
    "link",
    "tokens of a micro-batch",
    "step alone s",
    "step of the sweep s",
    "time, of K runs",
    "of the fastest steps",
    "CPU s, of K runs",
    "gathered MiB alone",
    "sweep",
    "gathered, of K runs",
    "sent, of K runs",
)


def make_row(found: dict[str, Any]) -> list[object]:
    def show(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.2f}"

    return [
        found["nodes"],
        found["form"],
        found["link"],
        found["tokens"],
        f"{found['alone']['seconds']:.2f}",
        f"{found['sweep']['seconds']:.2f}",
        show(found["seconds_ratio"]),
        show(found["fastest_ratio"]),
        show(found["cpu_seconds_ratio"]),
        found["alone"]["gathered"] / MIB,
        found["sweep"]["gathered"] / MIB,
        show(found["gathered_ratio"]),
        show(found["sent_ratio"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=8, help="K, the adapters of the sweep")
    parser.add_argument("--links", nargs="*", default=["1gbit"], metavar="RATE")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["nf4", "int8"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128], help="a micro-batch's")
    parser.add_argument("--wire-tokens", type=int, default=32, help="the same on two nodes")
    parser.add_argument("--steps", type=int, default=3, help="timed, of each side")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--r", type=int, default=4, help="rank of LoRA on all linears")
    parser.add_argument("--name", default="sweep", help="of the result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result")
    args = parser.parse_args()
    shape = {
        "vocab_size": 512,
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4,
        "num_hidden_layers": args.layers,
    }
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dist_peft_sweep") as name:
        directory = Path(name)
        make_base(directory / "base", **shape)
        text = "".join(chr(ord("a") + (i * i + i // 7) % 26) for i in range(2**14))
        (directory / "text.txt").write_text(text)
        results += [run_one_process(args, directory, tokens) for tokens in args.tokens]
        if args.links:
            for form in args.forms:
                results += run_two_nodes(args, directory, form)
    print_table(HEADER, [make_row(found) for found in results])
    options = {key: value for key, value in vars(args).items() if key not in ("out", "name")}
    result = {"transport": "gloo, TCP", "options": options, "base": shape, "runs": results}
    write_result(args.name, result, args.out)


if __name__ == "__main__":
    main()
