"""Step time and bytes on the wire: packed rows against bf16 rows, over links of a given speed.

    python benchmarks/wire.py [--nodes 2 3] [--links 10gbit 1gbit] [--engine fsdp2|zero]
        [--forms bf16 nf4 int4 int2] [--rounds 3] [--steps 3]

Each node is a network namespace with one rank (see ``netns.py``; needs root, ip and tc). All ranks
train with the project's own loop, on the same base, rows and adapter start; what differs is how
the blocks' linears are stored: as bf16 rows, which is what gathering decoded weights costs, or
packed. Forms take turns step by step, links take turns round by round.

The transport is gloo over TCP on the CPU, and all ranks share the machine's cores: ``unshaped``
shows what a step costs without a slow link (decoding included), and ``TCP`` what the link really
carries between two plain sockets. All forms compute in ``--dtype``; float32 is the default because
processors without bf16 instructions multiply bf16 matrices many times more slowly.

``--experts E`` takes a mixture of E experts, two a token, LoRA on attention, and compares
``nf4``, all experts gathered, with ``routed`` and ``tokens`` (``engine.gather_experts``)::

    python benchmarks/wire.py --experts 64 --nodes 2 --links 1gbit --hidden 256 --seq-len 4
"""

import argparse
import json
import os
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from common import MIB, RESULTS, make_base, print_table, write_result
from netns import UNSHAPED, Network
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from wire_rank import FORMS

PORT = 29500
TRANSFER_SECONDS = 0.4
PATIENCE_SECONDS = 600
MEASURES = ("seconds", "cpu_seconds", "sent", "gathered")

Step = dict[str, dict[str, float]]
"""Form -> what was measured in one step."""


class Ranks:
    """One rank a node, told what to do; a context manager.

    Args:
        script: file of this directory that a rank runs.
    """

    def __init__(
        self,
        network: Network,
        settings: dict[str, Any],
        log_dir: Path,
        script: str = "wire_rank.py",
    ) -> None:
        self._network, self._script = network, script
        self._settings = settings
        self._logs = [log_dir / f"rank{i}.log" for i in range(len(network.names))]
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        for rank in range(len(self._logs)):
            self._processes.append(self._start(rank))
        self.stored: dict[str, int] = self._answers()[0]
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if error[0] is None and process.stdin is not None:
                process.stdin.close()  # the rank leaves by itself
            else:
                process.kill()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, rank: int) -> "subprocess.Popen[str]":
        addresses = self._network.addresses
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(addresses)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": addresses[0],
            "MASTER_PORT": str(PORT),
            "RANK_1_ADDRESS": addresses[-1],
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        script = str(Path(__file__).with_name(self._script))
        with self._logs[rank].open("w") as log:
            return subprocess.Popen(
                self._network.command(rank, sys.executable, script, json.dumps(self._settings)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **env},
            )

    def ask(self, **order: Any) -> list[Any]:
        """Give every rank an order; their answers."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Any]:
        """A line of each rank, whatever order they come in; one that ends instead ends all."""
        answers: dict[int, Any] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                ready = waiting.select(PATIENCE_SECONDS)
                if not ready:
                    raise SystemExit(f"no answer within {PATIENCE_SECONDS} s")
                for key, _ in ready:
                    answers[key.data] = self._line(key.data)
                    waiting.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(answers))]

    def _line(self, rank: int) -> Any:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            tail = "\n".join(self._logs[rank].read_text().splitlines()[-15:])
            raise SystemExit(f"rank {rank} ended:\n{tail}")
        return json.loads(line)


def run(network: Network, ranks: Ranks, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds over the links; the first step of each visit to a link is left out."""
    links = [UNSHAPED, *args.links]
    visits: dict[str, list[list[Step]]] = {link: [] for link in links}
    tcp: dict[str, list[float]] = {link: [] for link in links}
    load: dict[str, list[float]] = {link: [] for link in links}
    ranks.ask(steps=1)
    for _ in range(args.rounds):
        for link in links:
            network.shape(link)
            tcp[link].append(ranks.ask(transfer=TRANSFER_SECONDS)[0])
            steps = ranks.ask(steps=args.steps + 1)
            visits[link] += [[of_rank[i] for of_rank in steps] for i in range(1, args.steps + 1)]
            load[link].append(os.getloadavg()[0])
    return [
        {
            "link": link,
            "tcp_gbit_s": statistics.median(tcp[link]),
            "load_average": load[link],
            "forms": {form: summary(form, visits[link]) for form in args.forms},
        }
        for link in links
    ]


def summary(form: str, steps: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Medians over steps of the slowest or busiest rank, and every step's seconds."""
    of_form = [[rank[form] for rank in step] for step in steps]
    most = {m: [max(rank[m] for rank in step) for step in of_form] for m in MEASURES}
    return {
        **{m: statistics.median(values) for m, values in most.items()},
        "loss": of_form[-1][0]["loss"],
        "all_seconds": [round(s, 4) for s in most["seconds"]],
    }


HEADER = (
    "nodes",
    "link",
    "TCP Gbit/s",
    "form",
    "step s",
    "fastest s",
    "CPU s",
    "gathered MiB",
    "sent MiB",
    "sent at TCP speed s",
    "time first/form",
    "sent first/form",
)


def time_ratio(first: Sequence[float], form: Sequence[float]) -> float:
    """Median over turns, so that a busy spell meets both sides of each ratio."""
    return statistics.median(a / b for a, b in zip(first, form, strict=True))


def table_rows(nodes: int, link: dict[str, Any]) -> list[list[object]]:
    forms = link["forms"]
    first = next(iter(forms.values()))
    return [
        [
            nodes,
            link["link"],
            f"{link['tcp_gbit_s']:.2f}",
            form,
            f"{found['seconds']:.3f}",
            f"{min(found['all_seconds']):.3f}",
            f"{found['cpu_seconds']:.3f}",
            found["gathered"] / MIB,
            found["sent"] / MIB,
            f"{found['sent'] * 8e-9 / link['tcp_gbit_s']:.3f}",
            f"{time_ratio(first['all_seconds'], found['all_seconds']):.2f}",
            f"{first['sent'] / found['sent']:.2f}",
        ]
        for form, found in forms.items()
    ]


def measure(nodes: int, args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    settings = {
        "base": str(directory / "base"),
        "data": str(directory / "text.txt"),
        "cache": str(directory / "cache"),
        "forms": args.forms,
        "engine": args.engine,
        "dtype": args.dtype,
        "seq_len": args.seq_len,
        "batch": args.batch,
        "r": args.r,
        "experts": args.experts,
    }
    with Network(nodes) as network, Ranks(network, settings, directory) as ranks:
        links = run(network, ranks, args)
        return {"nodes": nodes, "stored_bytes": ranks.stored, "links": links}


def make_mixture(base: Path, shape: dict[str, int], experts: int) -> None:
    """Put a mixture in the place of the dense model, whose tokenizer stays."""
    config = Qwen3MoeConfig(
        **{**shape, "intermediate_size": shape["hidden_size"]},
        moe_intermediate_size=shape["hidden_size"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape["hidden_size"] // 4,
        num_experts=experts,
        num_experts_per_tok=2,
    )
    for file in base.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(base)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--links", nargs="+", default=["10gbit", "1gbit"], metavar="RATE")
    parser.add_argument("--engine", choices=["fsdp2", "zero"], default="fsdp2")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=["nf4", "int4", "int2"],
        help="compared with bf16",
    )
    parser.add_argument("--rounds", type=int, default=3, help="visits to each link")
    parser.add_argument("--steps", type=int, default=3, help="timed in a visit, of each form")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0: a dense model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="rows a rank in a step")
    parser.add_argument("--r", type=int, default=4, help="rank of LoRA on all linears")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result")
    args = parser.parse_args()
    if args.experts:
        args.forms = ["nf4", "routed", "tokens"]
    else:
        args.forms = ["bf16", *(form for form in args.forms if form != "bf16")]
    if min(args.nodes) < 2 or min(args.rounds, args.steps) < 1:
        parser.error("at least 2 nodes, 1 round and 1 step")
    os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        parser.error(f"needs root and iproute2 (missing: {', '.join(missing) or 'root'})")
    return args


def leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, leave)  # so that namespaces are removed
    shape = {
        "vocab_size": 512,
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4,
        "num_hidden_layers": args.layers,
    }
    rows: list[list[object]] = []
    results = []
    with tempfile.TemporaryDirectory(prefix="dist_peft_wire") as scratch:
        directory = Path(scratch)
        make_base(directory / "base", **shape)
        if args.experts:
            make_mixture(directory / "base", shape, args.experts)
        text = "".join(chr(ord("a") + (i * i + i // 7) % 26) for i in range(2**14))
        (directory / "text.txt").write_text(text)
        for nodes in args.nodes:
            results.append(measure(nodes, args, directory))
            rows += [row for link in results[-1]["links"] for row in table_rows(nodes, link)]
    print_table(HEADER, rows)
    options = {key: value for key, value in vars(args).items() if key != "out"}
    result = {"transport": "gloo, TCP", "options": options, "base": shape, "runs": results}
    name = f"wire_experts_{args.seq_len}_tokens" if args.experts else f"wire_{args.engine}"
    write_result(name, result, args.out)


if __name__ == "__main__":
    main()
