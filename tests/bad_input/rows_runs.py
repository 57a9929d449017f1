"""Damaged run directories, checkpoints and adapters; merging and exporting them."""

import pickle
from typing import Any

import torch

from tests.bad_input.case import (
    Damage,
    Row,
    both,
    copy,
    cut,
    directory,
    edit_json,
    edit_tensors,
    edit_yaml,
    fifo,
    flip,
    link,
    remove,
    write,
)

LAST = "run/checkpoints/step-000002"
ADAPTER = "run/adapter/adapter_model.safetensors"
ABOUT = "run/adapter/dist_peft.json"
PUBLIC = "run/adapter/adapter_config.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _checkpoint(name: str, damage: Damage, *words: str) -> Row:
    """A row whose only checkpoint is damaged."""
    alone = both(remove("run/checkpoints/step-000001"), damage)
    return Row(f"checkpoint {name}", "resume", ("step-000002", *words), alone)


def _shown(name: str, damage: Damage, *words: str) -> Row:
    """A row whose damaged checkpoint is inspected."""
    return Row(f"checkpoint {name}, inspected", "inspect checkpoint", words, damage)


def _tensors(name: str, change: Any, *words: str, command: str = "merge") -> Row:
    return Row(f"adapter {name}", command, words, edit_tensors(ADAPTER, change))


def _adapter(name: str, damage: Damage, *words: str, command: str = "merge") -> Row:
    return Row(f"adapter {name}", command, words, damage)


def _fill(tensors: dict[str, Any], value: float) -> None:
    tensors[A].fill_(value)


def _fill_one(tensors: dict[str, Any], value: float) -> None:
    next(t for name, t in sorted(tensors.items()) if "down.0.weight" in name)[-1, -1] = value


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def _drop(file: str) -> Damage:
    """Remove a file of the checkpoint and its record, as a copy that went wrong."""
    return remove(f"{LAST}/{file}")


ROWS = [
    # -- checkpoints
    _checkpoint("run.json deep nesting", write(f"{LAST}/run.json", "[" * 100_000), "run.json"),
    _checkpoint("run.json step -1", edit_json(f"{LAST}/run.json", step=-1), "run.json"),
    _checkpoint("run.json step 20", edit_json(f"{LAST}/run.json", step=20), "run.json"),
    _checkpoint("run.json missing", _drop("run.json"), "run.json: No such file"),
    _checkpoint("run.json a FIFO", fifo(f"{LAST}/run.json"), "run.json", "regular file"),
    _checkpoint("run.json a directory", directory(f"{LAST}/run.json"), "run.json", "regular file"),
    _checkpoint(
        "without any file",
        both(remove(LAST), directory(LAST)),
        "every checkpoint",
        "unreadable run.json",
    ),
    _checkpoint("a file", both(remove(LAST), write(LAST, "x")), "it is no directory"),
    _checkpoint("files.json empty", write(f"{LAST}/files.json", ""), "files.json"),
    _checkpoint("files.json a FIFO", fifo(f"{LAST}/files.json"), "files.json", "regular file"),
    _checkpoint("metadata cut", cut(f"{LAST}/.metadata", 40), ".metadata"),
    _checkpoint(
        "metadata that runs code",
        both(write(f"{LAST}/.metadata", pickle.dumps(_Evil())), _drop("files.json")),
        "files.json",
    ),
    _checkpoint("shard cut", cut(f"{LAST}/__0_0.distcp", -9), "__0_0.distcp"),
    _checkpoint(
        "shard byte 100000 flipped",
        flip(f"{LAST}/__0_0.distcp", 100_000),
        "checksum",
        "__0_0.distcp",
    ),
    _checkpoint(
        "shard a link",
        both(copy(f"{LAST}/__0_0.distcp", "elsewhere"), link(f"{LAST}/__0_0.distcp", "/tmp")),
        "symbolic link",
    ),
    _shown("metadata a FIFO", fifo(f"{LAST}/.metadata"), ".metadata", "regular file"),
    Row(
        "checkpoint of another rank of the adapter",
        "resume",
        ("adapter.r", "16", "8"),
        args=("adapter.r=8",),
    ),
    Row(
        "checkpoint of other data",
        "resume",
        ("contents of data.train", "fingerprint"),
        copy("chat.jsonl", "train.jsonl"),
    ),
    Row(
        "checkpoint of a changed base",
        "resume",
        ("trained on another base than base", "restore the base"),
        edit_tensors("base/model.safetensors", lambda t: t["model.norm.weight"].fill_(1.0)),
    ),
    # -- run directory
    Row(
        "run is no directory",
        "merge",
        ("is no run directory", "config.yaml"),
        both(remove("run"), write("run", "x")),
    ),
    Row("run missing", "merge", ("is no run directory", "config.yaml"), remove("run")),
    Row(
        "run without config.yaml",
        "merge",
        ("no run directory", "config.yaml"),
        remove("run/config.yaml"),
    ),
    Row("run without adapter", "merge", ("adapter", "resume"), remove("run/adapter")),
    Row(
        "run with a reference",
        "merge",
        ("${...}", "base.path", "not sent to the Hub"),
        edit_yaml("run/config.yaml", base__path="${oc.env:PATH}"),
    ),
    Row(
        "run with remote code",
        "merge",
        ("trust_remote_code", "--trust-remote-code"),
        edit_yaml("run/config.yaml", base__trust_remote_code=True),
    ),
    Row(
        "run of another quantization",
        "merge",
        ("base.quant", "was trained with"),
        edit_yaml("run/config.yaml", base__quant={"kind": "int"}),
    ),
    Row(
        "run with a damaged paths.json",
        "merge",
        ("paths.json is damaged", "remove it"),
        write("run/paths.json", "["),
    ),
    Row(
        "run with paths.json a FIFO",
        "merge",
        ("paths.json", "regular file"),
        fifo("run/paths.json"),
    ),
    Row(
        "run with run_state.json a FIFO",
        "inspect run",
        ("run_state.json", "regular file"),
        fifo("run/run_state.json"),
    ),
    Row(
        "run with a damaged best.json",
        "merge",
        ("best.json is damaged",),
        write("run/checkpoints/best.json", "{"),
        ("--checkpoint", "best"),
    ),
    Row("run without step 9", "merge", ("step-000009", "steps 1, 2"), args=("--checkpoint", "9")),
    Row(
        "run whose base is another",
        "merge",
        ("trained on another base than base", "set base.path"),
        edit_tensors("base/model.safetensors", lambda t: t["model.norm.weight"].fill_(1.0)),
    ),
    Row(
        "run whose log is a link",
        "resume",
        ("log.txt is a link",),
        link("run/log.txt", "/dev/null"),
    ),
    Row("run whose log is a FIFO", "resume", ("log.txt",), fifo("run/log.txt")),
    Row(
        "run whose metrics are damaged",
        "resume",
        ("metrics.jsonl",),
        write("run/metrics.jsonl", "{\n{\n"),
    ),
    # -- adapters
    _adapter("cut", cut(ADAPTER, -50), "adapter_model.safetensors is damaged", "get it again"),
    _adapter("a FIFO", fifo(ADAPTER), "adapter_model.safetensors", "regular file"),
    _tensors("NaN", lambda t: _fill(t, float("nan")), "lora_A", "holds nan"),
    _tensors("integers", lambda t: t.update({A: t[A].long()}), "lora_A", "int64"),
    _tensors("tensor missing", lambda t: t.pop(A), "lora_A"),
    _tensors(
        "tensor of another rank", lambda t: t.update({A: torch.zeros(3, 64)}), "lora_A", "shape"
    ),
    _tensors("NaN, to mlx", lambda t: _fill(t, float("nan")), "lora_A", "holds nan", command="mlx"),
    _tensors(
        "NaN, combined", lambda t: _fill(t, float("nan")), "lora_A", "holds nan", command="combine"
    ),
    _adapter("config deep nesting", write(PUBLIC, "[" * 100_000), "adapter_config.json"),
    _adapter("config a FIFO", fifo(PUBLIC), "adapter_config.json", "regular file"),
    _adapter("config r 10**9", edit_json(PUBLIC, r=10**9), "adapter_config.json", "r"),
    _adapter("config alpha another", edit_json(PUBLIC, lora_alpha=99), "lora_alpha"),
    _adapter("about deep nesting", write(ABOUT, "[" * 100_000), "dist_peft.json"),
    _adapter("about a FIFO", fifo(ABOUT), "dist_peft.json", "regular file"),
    _adapter(
        "about a list, inspected", write(ABOUT, "[]"), "dist_peft.json", command="inspect adapter"
    ),
    Row(
        "fused adapter cut",
        "fuse",
        ("bottleneck_b", "truncated"),
        cut("bottleneck_b/adapter.safetensors", -50),
    ),
    Row(
        "fused adapter NaN",
        "fuse",
        ("adapter.adapters: bottleneck_b", "adapter_down.0.weight", "holds nan"),
        edit_tensors("bottleneck_b/adapter.safetensors", lambda t: _fill_one(t, float("nan"))),
    ),
    Row(
        "fused adapter infinite",
        "fuse",
        ("adapter.adapters: bottleneck_a", "holds inf"),
        edit_tensors("bottleneck_a/adapter.safetensors", lambda t: _fill_one(t, float("inf"))),
    ),
    Row(
        "fused adapter a LoRA",
        "fuse",
        ("run/adapter", "bottleneck adapter"),
        args=("adapter.adapters=[bottleneck_a, {path: run/adapter, name: b}]",),
    ),
    # -- outputs
    Row("out exists", "merge", ("out", "--overwrite"), write("out/model.safetensors", "x")),
    Row("out a file", "merge", ("out is a file",), write("out", "x")),
    Row("out too long", "merge", ("--out", "too long"), args=("--out", "x" * 300)),
    Row("out too long, to mlx", "mlx", ("--out", "too long"), args=("--out", "x" * 300)),
    Row("out with NUL", "merge", ("--out", "null"), args=("--out", "a\0b")),
    Row("out empty", "merge", ("--out: an empty path",), args=("--out", "")),
    Row(
        "out is the base",
        "merge",
        ("--overwrite", "would remove base"),
        args=("--out", "base", "--overwrite"),
    ),
    Row("mlx group -64", "mlx", ("--group-size", "-64"), args=("--group-size", "-64")),
    Row("mlx group 0", "mlx", ("--group-size", "0"), args=("--group-size", "0")),
    Row("weights too few", "combine", ("--weights", "2 adapters"), args=("--weights", "0.5")),
    Row("weights NaN", "combine", ("--weights", "finite"), args=("--weights", "nan", "0.5")),
    Row(
        "density 0",
        "combine",
        ("--density", "at most 1"),
        args=("--method", "ties", "--density", "0"),
    ),
]
