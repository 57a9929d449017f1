"""Host memory of ``merge_model`` at several chunk sizes, above an empty process.

python benchmarks/merge_memory.py [--chunks 16 64] [--into original|decoded]
"""

import argparse
import json
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
from safetensors.torch import save_file

from dist_peft.core.config.run import LoraConfig
from dist_peft.export.merge_weights import merge_model
from dist_peft.model.skeleton import build_skeleton


@dataclass(frozen=True)
class MergeMemory:
    """``chunk`` in MiB, all else in bytes; peaks are above the process before the merge."""

    chunk: int
    into: str
    peak: int
    peak_anonymous: int
    bytes_written: int


def make_adapter(base: Path, directory: Path) -> None:
    """A random LoRA adapter, r=16 on all linears of the blocks, as PEFT writes it."""
    directory.mkdir()
    lora = LoraConfig()
    tensors = {}
    model = build_skeleton(run_config(base).base, base).model
    for path, module in model.named_modules():
        if hasattr(module, "codec") and path != "lm_head":
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(lora.r, module.in_features)
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, lora.r) * 1e-3
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "target_modules": "all-linear",
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def measure(base: Path, adapter: Path, out: Path, chunk: int, into: str) -> MergeMemory:
    torch.set_num_threads(1)
    empty = Memory.now()
    with PeakMemory() as memory:
        report = merge_model(
            run_config(base).base, base, adapter, out, into=into, chunk_bytes=chunk * MIB
        )
    return MergeMemory(
        chunk,
        into,
        memory.resident - empty.resident,
        memory.anonymous - empty.anonymous,
        report.bytes_written,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    base_argument(parser)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64], help="MiB")
    parser.add_argument("--into", nargs="+", default=["original", "decoded"])
    args = parser.parse_args()
    base = make_base(args.base)
    results: list[MergeMemory] = []
    for into in args.into:
        for chunk in args.chunks:
            with tempfile.TemporaryDirectory() as scratch:
                adapter = Path(scratch) / "adapter"
                make_adapter(base, adapter)
                job = (base, adapter, Path(scratch) / "merged", chunk, into)
                results += run_processes(measure, [job])
    print("MiB; peaks are above the same process before the merge\n")
    print_table(
        ("chunk", "into", "peak", "peak private", "written"),
        [
            (r.chunk, r.into, *(b / MIB for b in (r.peak, r.peak_anonymous, r.bytes_written)))
            for r in results
        ],
    )
    write_result("merge_memory", results)


if __name__ == "__main__":
    main()
