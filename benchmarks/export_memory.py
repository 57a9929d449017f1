"""Host memory of every quantized export, for a base and for one with twice the blocks.

The difference of the two peaks by the difference of their parameters is what a parameter of the
base costs. An export that streams holds no more than a chunk of the base; the adapter, which grows
with the base, is held as a whole.

python benchmarks/export_memory.py [--formats bnb-nf4 gptq ...]
"""

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    MIB,
    Memory,
    PeakMemory,
    base_argument,
    make_base,
    print_table,
    run_config,
    run_processes,
    write_result,
)
from merge_memory import make_adapter

from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.formats.registry import export_model
from dist_peft.store.index import SafetensorsIndex

FORMATS = ("bnb-nf4", "gptq", "compressed-tensors", "mlx", "hf-metal", "gguf")


@dataclass(frozen=True)
class ExportMemory:
    """``parameters`` of the base, all else in bytes; peaks are above the process before."""

    format: str
    parameters: int
    adapter: int
    peak: int
    peak_anonymous: int
    bytes_written: int


def measure(base: Path, adapter: Path, out: Path, name: str) -> ExportMemory:
    torch.set_num_threads(1)
    config = run_config(base, base={"quant": {"kind": "int", "bits": 4, "group_size": 32}}).base
    parameters = sum(math.prod(t.shape) for t in SafetensorsIndex.open(base).tensors.values())
    empty = Memory.now()
    with PeakMemory() as memory:
        exported = export_model(name, ExportSpec(config, base, adapter, out))
    return ExportMemory(
        name,
        parameters,
        (adapter / "adapter_model.safetensors").stat().st_size,
        memory.resident - empty.resident,
        memory.anonymous - empty.anonymous,
        exported.written.bytes_written,
    )


def measure_all(base: Path, formats: list[str]) -> list[ExportMemory]:
    found = []
    for name in formats:
        with tempfile.TemporaryDirectory() as scratch:
            adapter = Path(scratch) / "adapter"
            make_adapter(base, adapter)
            out = Path(scratch) / "out"
            found += run_processes(measure, [(base, adapter, out, name)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    small = measure_all(make_base(args.base), args.formats)
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", num_hidden_layers=16)
        large = measure_all(base, args.formats)
    rows = []
    for a, b in zip(small, large, strict=True):
        more = b.parameters - a.parameters
        slope = (b.peak_anonymous - a.peak_anonymous) / more
        sizes = (a.peak, a.peak_anonymous, b.peak, b.peak_anonymous, a.bytes_written)
        own = (b.adapter - a.adapter) / more
        rows.append((a.format, *(s / MIB for s in sizes), f"{slope:.2f}", f"{own:.2f}"))
    few, many = (round(results[0].parameters / 1e6) for results in (small, large))
    print("MiB; peaks are above the same process before the export\n")
    header = ["format", f"peak, {few} M", "private", f"peak, {many} M", "private", "written"]
    print_table([*header, "private bytes a parameter", "of the adapter"], rows)
    write_result("export_memory", {"small": small, "large": large})


if __name__ == "__main__":
    main()
