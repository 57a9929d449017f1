"""A finished run with ``train.exact``, to change bytes of it and to replay its steps."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_files import format_checksum_record, hash_file
from dist_peft.train.checkpoint_hash import hash_checkpoint_state
from dist_peft.train.checkpoint_verify import read_metadata
from dist_peft.train.state_chain import CHAIN_FILE, read_chain
from tests.support.tiny_runs import tiny_tree, train

STEPS, EVERY = 4, 2


def exact_run(directory: Path, **changes: Any) -> Path:
    """Train four steps; checkpoints of steps 2 and 4 are kept."""
    run_dir = directory / "run"
    tree = tiny_tree(
        directory,
        train__exact=True,
        train__steps=STEPS,
        train__micro_batch=2,
        train__global_batch=3,
        save={"dir": str(run_dir), "every": EVERY, "keep": 5},
        **changes,
    )
    assert train(tree) == 0
    close_log()
    return run_dir


def copy_run(run_dir: Path, directory: Path) -> Path:
    return Path(shutil.copytree(run_dir, directory / "copy"))


def flip_byte(file: Path, place: int = -1) -> None:
    """Change one bit of the byte at ``place``."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def change_weight(file: Path) -> None:
    """Change the last bit of one value of an adapter's first tensor."""
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] = tensors[name].view(-1)[0].nextafter(tensors[name].new_tensor(9.0))
    save_file(tensors, file)


def forge_state(checkpoint: Path) -> None:
    """Change the last bit of one value of a checkpoint, and its checksums to fit."""
    manager = CheckpointManager(checkpoint.parent, 9, World())
    names = read_metadata(checkpoint).state_dict_metadata
    state: dict[str, Any] = manager.read_whole_tensors(checkpoint, names)
    values = state[min(state)].view(-1)
    values[0] = values[0].nextafter(torch.tensor(9.0))
    with tempfile.TemporaryDirectory() as directory:
        other = CheckpointManager(Path(directory), 1, World())
        made = other.save_checkpoint(state, manager.read_position(checkpoint))
        for name in (".metadata", "__0_0.distcp"):
            shutil.copy(made / name, checkpoint / name)
    _write_checksums(checkpoint)


def forge_chain(run_dir: Path) -> None:
    """Compute the chain of a run's last checkpoint and adapter again, to fit its last state."""
    checkpoint = max((run_dir / "checkpoints").glob("step-*"))
    chain, adapter = read_chain(checkpoint), read_chain(run_dir / "adapter")
    assert chain is not None and adapter is not None
    last = replace(chain.links[-1], state=hash_checkpoint_state(checkpoint))
    forged = chain.cut_after(last.step - 1).add_link(last)
    (checkpoint / CHAIN_FILE).write_text(forged.to_json())
    (run_dir / "adapter" / CHAIN_FILE).write_text(forged.add_adapter(adapter.adapter).to_json())
    _write_checksums(checkpoint)


def _write_checksums(checkpoint: Path) -> None:
    record = {p.name: hash_file(p) for p in checkpoint.iterdir() if p.name != "files.json"}
    (checkpoint / "files.json").write_text(format_checksum_record(record))
