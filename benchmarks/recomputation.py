"""What recomputation costs and keeps: CPU seconds, bytes and decodes of a micro-batch.

    python benchmarks/recomputation.py

A Llama of 8 blocks with random weights in NF4, LoRA of rank 16 on all linears with dropout 0.05,
one packed row of four documents, bfloat16, one thread. Ways of ``engine``, in turn, each several
times; the least of a way's CPU seconds counts, as other work on the machine only adds. Losses and
gradients of all ways are compared bit for bit.

Bytes are those of tensors that live between forward and backward, beyond those that live before,
by ``plan.storage_tracker``; the peak is the most that lives at any time of the micro-batch, beyond
the same. Input offload is measured with copies within one memory; its bytes are
those on the device. Nothing here is the time of a GPU.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import print_table, run_config, write_result
from gpu.random_base import RandomModel, build_random_model, make_packed_batch, shrink_base

from dist_peft.engine import activation_checkpointing
from dist_peft.engine.input_offload import InputOffload, PlainCopies
from dist_peft.plan.storage_tracker import StorageTracker
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.train.objective import TokenObjective

CPU = torch.device("cpu")
LENGTH, VOCABULARY, BLOCKS = 1024, 2000, 8
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
}
WAYS: dict[str, dict[str, Any]] = {
    "everything kept": {"activation_checkpointing": False},
    "products": {"keep_results": "products"},
    "attention": {"keep_results": "attention"},
    "none": {"keep_results": "none"},
    "none, share_decodes": {"share_decodes": True},
    "attention, share_decodes": {"keep_results": "attention", "share_decodes": True},
    "none, offload_inputs": {"keep_results": "none", "offload_inputs": True},
}
ROUNDS = 5
SHORT = 256
CODECS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "int4": {"kind": "int", "bits": 4},
    "int3": {"kind": "int", "bits": 3},
}
"""Of the second table, with ``SHORT`` tokens: a decode is a larger part of a short micro-batch."""


def build(
    engine: dict[str, Any], scratch: Path, quant: dict[str, Any] | None = None
) -> RandomModel:
    config = run_config(
        Path("random"),
        base={"quant": quant or {"kind": "nf4"}, "compute_dtype": "bfloat16"},
        adapter={"kind": "lora", "r": 16, "dropout": 0.05},
        engine={"kind": "single", **engine},
        train={"global_batch": 1},
        data={"train": ["unused.jsonl"], "seq_len": LENGTH, "packing": True},
    )
    built = build_random_model(config, shrink_base(SIZES, scratch / "config.json"), scratch, CPU)
    generator = torch.Generator().manual_seed(1)
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return built


def run_micro_batch(
    built: RandomModel, length: int = LENGTH
) -> tuple[float, list[torch.Tensor], float, dict[str, int]]:
    """Return loss, gradients, CPU seconds, and bytes: ``bytes`` between forward and backward,
    ``host_bytes`` then, ``peak_bytes``."""
    batch = make_packed_batch(length, VOCABULARY, 0)
    built.adapter.begin_micro_batch(0, batch.sample_ids)
    for parameter in built.model.parameters():
        parameter.grad = None
    before = time.process_time()
    loss = TokenObjective().compute_loss(built.model, batch, CPU, built.model)
    loss.backward()
    seconds = time.process_time() - before
    gradients = [p.grad.clone() for p in built.model.parameters() if p.grad is not None]
    tracker = StorageTracker()
    tracker.add_tensors([*built.model.parameters(), *built.model.buffers(), *gradients], "resting")
    before_forward = tracker.total
    with tracker:
        kept = TokenObjective().compute_loss(built.model, batch, CPU, built.model)
        sizes = {"bytes": tracker.total - before_forward, "host_bytes": tracker.host_bytes}
        kept.backward()
        del kept
    sizes["peak_bytes"] = tracker.peaks[tracker.phase].total - before_forward
    return float(loss.detach()), gradients, seconds, sizes


def count_decodes(built: RandomModel) -> int:
    decode, calls = Nf4Codec.dequantize_rows, []

    def count(*args: Any) -> torch.Tensor:
        calls.append(1)
        return decode(*args)

    Nf4Codec.dequantize_rows = count  # type: ignore[method-assign]
    try:
        run_micro_batch(built)
    finally:
        Nf4Codec.dequantize_rows = decode  # type: ignore[method-assign]
    return len(calls) // 2  # the tracked pass decodes as often


def compare_codecs(scratch: Path) -> dict[str, dict[str, float]]:
    """Least CPU seconds of a short micro-batch, decodes apart and shared, in turn."""
    models = {}
    for name, quant in CODECS.items():
        for shares in (False, True):
            (own := scratch / f"{name} {shares}").mkdir()
            models[name, shares] = build({"share_decodes": shares}, own, quant)
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in models}
    for _ in range(2 * ROUNDS):
        for name in CODECS:
            results = []
            for shares in (False, True):
                loss, gradients, spent, _ = run_micro_batch(models[name, shares], SHORT)
                seconds[name, shares].append(spent)
                results.append((loss, gradients))
            (loss, gradients), (other, others) = results
            assert loss == other
            assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    return {
        name: {"apart": min(seconds[name, False]), "shared": min(seconds[name, True])}
        for name in CODECS
    }


def main() -> None:
    torch.set_num_threads(1)
    activation_checkpointing.make_input_offload = lambda config, device: (
        InputOffload(PlainCopies()) if config.offload_inputs else None
    )
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for number, (way, engine) in enumerate(WAYS.items()):
            (own := Path(scratch) / str(number)).mkdir()
            models[way] = build(engine, own)
        codecs = compare_codecs(Path(scratch))
    records: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in WAYS}
    expected = None
    for _ in range(ROUNDS):
        for way, built in models.items():
            loss, gradients, seconds, sizes = run_micro_batch(built)
            expected = expected or (loss, gradients)
            assert loss == expected[0]
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))
            records[way]["seconds"].append(seconds)
            records[way] |= sizes
    for way, built in models.items():
        records[way]["decodes"] = count_decodes(built)
    rows = [
        [
            way,
            f"{min(found['seconds']):.2f}",
            f"{found['bytes'] / 2**20:.1f}",
            f"{found['peak_bytes'] / 2**20:.1f}",
            f"{found['host_bytes'] / 2**20:.1f}",
            str(found["decodes"]),
        ]
        for way, found in records.items()
    ]
    print_table(["way", "CPU s", "MiB kept", "peak MiB", "MiB on the host", "decodes"], rows)
    rows = [
        [name, f"{found['apart']:.3f}", f"{found['shared']:.3f}"] for name, found in codecs.items()
    ]
    print_table([f"codec, {SHORT} tokens", "CPU s", "decodes shared"], rows)
    write_result(
        "recomputation", {"codecs": codecs, "sizes": SIZES, "tokens": LENGTH, "ways": records}
    )


if __name__ == "__main__":
    main()
