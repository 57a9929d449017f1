"""CPU time of loading an NF4 base here and by bitsandbytes' loader in transformers.

    python benchmarks/load_cpu.py [--base DIR] [--repeats 5]

Each load runs in a fresh process; the sides take turns. Seconds are the process's own, user and
system apart, from before the model is built until it is loaded. Memory is measured in a first round
of its own, because sampling it takes CPU time. A load of a tiny model comes first,
on every side, so that imports and whatever else happens once a process are not counted. Storage is
no part of it: the files are read into the page cache before. The projection scales this program's
seconds a parameter to 65 B parameters on ``N`` ranks, each of which reads, quantizes and keeps its
rows.
"""

import argparse
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from common import (
    MIB,
    PeakMemory,
    base_argument,
    make_base,
    print_table,
    run_config,
    run_processes,
    write_result,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World

CPU = torch.device("cpu")
LARGE = 65e9
"""Parameters of the projection."""

Measured = tuple[float, float, int]
"""Seconds of user and system time, peak of private memory in bytes above that before, 0 where that
was not measured."""


def measure(load: Callable[[], object], sample_memory: bool) -> Measured:
    torch.set_num_threads(1)
    if sample_memory:
        with PeakMemory() as memory:
            kept = load()
        del kept
        return 0.0, 0.0, memory.anonymous - memory.before.anonymous
    before = resource.getrusage(resource.RUSAGE_SELF)
    kept = load()
    after = resource.getrusage(resource.RUSAGE_SELF)
    del kept
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, 0


def load_here(base: Path, tiny: Path, sample_memory: bool, threads: int) -> Measured:
    def load(directory: Path) -> object:
        config = run_config(directory, adapter={"r": 1})
        return load_weights(build_model(resolve_config(config)), World(), CPU)

    with mock.patch("dist_peft.app.model_setup.count_load_threads", return_value=threads):
        load(tiny)
        return measure(lambda: load(base), sample_memory)


def load_by_bitsandbytes(base: Path, tiny: Path, sample_memory: bool) -> Measured:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def load(directory: Path) -> object:
        return AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
        )

    load(tiny)
    return measure(lambda: load(base), sample_memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tiny = make_base(Path(directory), hidden_size=256, intermediate_size=256)
        base = make_base(args.base)
        parameters = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2
        sides: dict[str, tuple[Callable[..., Measured], tuple[object, ...]]] = {
            "dist_peft": (load_here, (1,)),
            "dist_peft, 2 threads": (load_here, (2,)),
            "bitsandbytes": (load_by_bitsandbytes, ()),
        }
        measured: dict[str, list[Measured]] = {name: [] for name in sides}
        peaks: dict[str, int] = {}
        for repeat in range(args.repeats + 1):
            for file in base.glob("*.safetensors"):
                file.read_bytes()
            for name, (load, arguments) in sides.items():
                (found,) = run_processes(load, [(base, tiny, not repeat, *arguments)])
                if repeat:
                    measured[name].append(found)
                else:
                    peaks[name] = found[2]
    rows = []
    for name, found in measured.items():
        user, system, _ = (statistics.median(column) for column in zip(*found, strict=True))
        total = statistics.median(sum(one[:2]) for one in found)
        rows.append([name, f"{user:.2f}", f"{system:.2f}", f"{total:.2f}", peaks[name] / MIB])
    print_table(["loader", "user s", "system s", "CPU s", "private peak +MiB"], rows)
    pairs = zip(measured["dist_peft"], measured["bitsandbytes"], strict=True)
    ratio = statistics.median(sum(one[:2]) / sum(other[:2]) for one, other in pairs)
    per_parameter = (
        statistics.median(sum(found[:2]) for found in measured["dist_peft"]) / parameters
    )
    projected = {ranks: per_parameter * LARGE / ranks for ranks in (1, 8, 64)}
    print(f"\nratio of CPU seconds, dist_peft / bitsandbytes: {ratio:.2f}")
    print(f"{per_parameter * 1e9:.1f} ns a parameter; projected for 65 B parameters, CPU s a rank:")
    print(", ".join(f"{ranks} ranks: {seconds:.0f}" for ranks, seconds in projected.items()))
    result = {
        "load": os.getloadavg(),
        "parameters": parameters,
        "user_system": {name: [one[:2] for one in found] for name, found in measured.items()},
        "private_peak": peaks,
        "ratio_of_cpu_seconds": ratio,
        "ns_per_parameter": per_parameter * 1e9,
        "projected_cpu_s_a_rank_65b": projected,
    }
    write_result("load_cpu", result)


if __name__ == "__main__":
    main()
