"""A row of the table of bad inputs, and the workspace that it damages."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tests.support.forked_commands import run_forked
from tests.support.tiny_models import ENCODERS, save_model
from tests.support.tiny_runs import save_base, save_records, save_words

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--config", "config.yaml", "save.dir=new"),
    "resume": ("train", "--config", "config.yaml", "train.steps=3"),
    "chat": ("train", "--config", "config.yaml", "save.dir=new", "data.train=[chat.jsonl]"),
    "classify": ("train", "--config", "classify.yaml"),
    "fuse": ("train", "--config", "fuse.yaml"),
    "validate": ("validate", "--config", "config.yaml"),
    "plan": ("plan", "--config", "config.yaml", "--gpu-memory", "1GiB"),
    "talk": (
        *("chat", "--run", "run", "--prompt", "w9", "--prompt", "w12"),
        *("--max-new-tokens", "2", "--device", "cpu"),
    ),
    "eval": ("eval", "--config", "config.yaml", "--run", "run"),
    "quantize": (
        *("quantize", "--config", "config.yaml", "--out", "out"),
        "base.quant={kind: int, bits: 4, group_size: 16}",
    ),
    "merge": ("merge", "--run", "run", "--out", "out", "--no-verify"),
    "mlx": ("export", "--format", "mlx", "--run", "run", "--out", "out", "--no-verify"),
    "peft": ("export", "--format", "peft", "--run", "run", "--out", "out", "--no-verify"),
    "combine": ("combine", "run/adapter", "second", "--out", "out"),
    "inspect base": ("inspect", "base"),
    "inspect run": ("inspect", "run"),
    "inspect adapter": ("inspect", "run/adapter"),
    "inspect checkpoint": ("inspect", "run/checkpoints/step-000002"),
}
"""The commands of the rows. Each ends with 0 in an undamaged workspace."""


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: what is wrong.
        command: key of ``COMMANDS``.
        words: parts of the one message, in any case: what is wrong, and the fix.
        damage: changes the workspace.
        args: further arguments.
        env: further variables; an empty one is unset.
        ranks: number of processes.
        rank_args, rank_env: arguments and variables of single ranks.
    """

    name: str
    command: str
    words: tuple[str, ...]
    damage: Callable[[Path], object] | None = None
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    rank_args: Mapping[int, Sequence[str]] = field(default_factory=dict)
    rank_env: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Return the command line."""
        return [*COMMANDS[self.command], *self.args]


# -- the undamaged workspace -----------------------------------------------------------------------

_CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"w{i + 9} w5"},
            {"role": "assistant", "content": f"w{i + 20} w6 w7"},
        ]
    }
    for i in range(6)
]


def make_workspace(root: Path) -> Path:
    """Make bases, data, configurations and finished runs, all found by relative paths."""
    root.mkdir()
    save_base(root / "base")
    save_model(ENCODERS["bert"], root / "encoder")
    save_words(root / "encoder")
    for name in ("train", "eval"):
        save_records(root / f"{name}.jsonl", 4)
    _write_lines(root / "chat.jsonl", _CHAT)
    labelled = [{"text": f"w{9 + i} w5", "label": ("no", "yes")[i % 2]} for i in range(6)]
    _write_lines(root / "labels.jsonl", labelled)
    tree: dict[str, Any] = {
        "base": {"path": "base", "compute_dtype": "float32", "quant": None},
        "adapter": {"kind": "lora"},
        "data": {
            "train": ["train.jsonl"],
            "eval": ["eval.jsonl"],
            "seq_len": 32,
            "packing": False,
            "cache_dir": "cache",
        },
        "train": {"global_batch": 2, "lr": 1e-2, "steps": 2, "device": "cpu", "samples": 0},
        "save": {"dir": "run", "every": 1},
        "engine": {"start_timeout_minutes": 0.2, "timeout_minutes": 0.5},
    }
    OmegaConf.save(OmegaConf.create(tree), root / "config.yaml")
    source = {"path": "labels.jsonl", "format": "classification", "labels": ["no", "yes"]}
    classify = tree | {
        "base": {**tree["base"], "path": "encoder", "head": "classifier"},
        "adapter": {"kind": "lora"},
        "data": {"train": [source], "seq_len": 32, "cache_dir": "cache"},
        "save": {"dir": "new", "every": 1},
    }
    OmegaConf.save(OmegaConf.create(classify), root / "classify.yaml")
    fuse = tree | {
        "adapter": {"kind": "fusion", "adapters": ["bottleneck_a", "bottleneck_b"]},
        "save": {"dir": "new", "every": 1},
    }
    OmegaConf.save(OmegaConf.create(fuse), root / "fuse.yaml")
    run_to_end(root, ["train", "--config", "config.yaml"])
    for name in ("a", "b"):
        kind = "adapter={kind: bottleneck, reduction_factor: 8}"
        run_to_end(
            root, ["train", "--config", "config.yaml", kind, "train.steps=1", "save.dir=made"]
        )
        (root / "made" / "adapter").rename(root / f"bottleneck_{name}")
        shutil.rmtree(root / "made")
    shutil.copytree(root / "run" / "adapter", root / "second")
    return root


def _write_lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run_to_end(root: Path, arguments: Sequence[str]) -> None:
    """Run a command that ends with 0, or show what it printed."""
    (ended,) = run_forked(arguments, root)
    assert ended.code == 0, f"{arguments}: {ended.code}\n{ended.stderr}"


# -- damage ----------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def write(name: str, content: str | bytes) -> Damage:
    """Replace a file, or add one."""
    data = content.encode() if isinstance(content, str) else content

    def damage(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return damage


def records(name: str, *items: Any) -> Damage:
    """Replace a JSON Lines file."""
    return write(name, "".join(json.dumps(item) + "\n" for item in items))


def edit_json(name: str, *path: str, **values: Any) -> Damage:
    """Change keys of the object at ``path`` of a JSON file; ``...`` removes one."""

    def damage(root: Path) -> None:
        tree = node = json.loads((root / name).read_text())
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node[key]
        for key, value in values.items():
            if value is ...:
                del node[key]
            else:
                node[key] = value
        (root / name).write_text(json.dumps(tree))

    return damage


def edit_yaml(name: str, **values: Any) -> Damage:
    """Change keys of a YAML file, ``section__key=value``."""

    def damage(root: Path) -> None:
        tree = OmegaConf.load(root / name)
        for key, value in values.items():
            OmegaConf.update(tree, key.replace("__", "."), value)
        OmegaConf.save(tree, root / name)

    return damage


def edit_tensors(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the tensors of a safetensors file."""

    def damage(root: Path) -> None:
        tensors = load_file(root / name)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, root / name, {"format": "pt"})

    return damage


def edit_header(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of a safetensors file and leave its data."""

    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        (root / name).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def cut(name: str, size: int) -> Damage:
    """Cut a file to ``size`` bytes (negative: so many from its end)."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def flip(name: str, at: int) -> Damage:
    """Flip one bit of the byte ``at``."""

    def damage(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[at] ^= 1
        (root / name).write_bytes(data)

    return damage


def remove(*names: str) -> Damage:
    """Remove files or directories."""

    def damage(root: Path) -> None:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def copy(source: str, target: str) -> Damage:
    """Copy a file over another."""
    return lambda root: shutil.copyfile(root / source, root / target)


def fifo(name: str) -> Damage:
    """Put a named pipe, which blocks whoever opens it, in place of a file."""

    def damage(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)

    return damage


def directory(name: str) -> Damage:
    """Put a directory in place of a file."""

    def damage(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).mkdir(parents=True)

    return damage


def link(name: str, target: str) -> Damage:
    """Put a symbolic link in place of a file or directory."""

    def damage(root: Path) -> None:
        remove(name)(root) if (root / name).exists() else None
        (root / name).symlink_to(target)

    return damage


def both(*damages: Damage) -> Damage:
    """Do one damage after the other."""
    return lambda root: [damage(root) for damage in damages]
