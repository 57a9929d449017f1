"""Blocks that GPTQ has solved, kept on disk until the packed base is written.

A hidden directory next to the output, named by a digest of everything that the result depends on,
holds a file a block::

    .NAME.solved-DIGEST/block-00000.safetensors    packed rows, uint8 [out, row_bytes] a linear

A solve that was stopped or killed continues after the last of them; a solve with other inputs has
another name and removes the directory. The first rank alone reads and writes it: the others need
not see the disk, and the number of ranks may change.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_peft.core.agreement import hash_json_value
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.store.writer import write_atomically

__all__ = ["SolvedBlocks"]

log = logging.getLogger("dist_peft")


class SolvedBlocks:
    """The solved blocks of one solve; every method is collective."""

    def __init__(self, out: Path, inputs: Mapping[str, object], world: World) -> None:
        """Choose the directory, and remove those of solves of ``out`` with other inputs.

        Args:
            out: where the packed base will be.
            inputs: everything that the packed rows depend on; equal on all ranks.

        Raises:
            UserError: on every rank: the directory cannot be made.
        """
        self.world = world
        prefix = f".{out.name}.solved-"
        self.directory = out.with_name(prefix + hash_json_value(inputs)[:20])

        def prepare() -> None:
            for other in out.parent.glob(f"{prefix}*"):
                if other != self.directory:
                    shutil.rmtree(other, ignore_errors=True)
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {self.directory}: {error.strerror}") from None

        world.run_on_first("prepare the directory of solved blocks", prepare)

    def restore_block(self, number: int, block: nn.Module, engine: Engine) -> bool:
        """Fill the linears of ``block`` with their packed rows if the block was solved before.

        Returns:
            Whether it was; False as well where its file is damaged.
        """
        linears = _list_linears(block)
        packed: dict[str, Tensor] | None = None
        if self.world.is_first:
            packed = _read_block(self._get_path(number), linears)
        if not self.world.any_rank(packed is not None):
            return False
        for source, linear in linears.items():
            whole = torch.empty(tuple(linear.packed.shape), dtype=torch.uint8)
            if packed is not None:
                whole = packed.pop(source).contiguous()
            self.world.broadcast_tensor(whole, 0)
            span = engine.local_row_span(linear.packed)
            rows = whole[span.start : span.stop].to(engine.device)
            engine.fill_local_rows(linear, "packed", rows)
        return True

    def save_block(self, number: int, block: nn.Module, engine: Engine) -> None:
        """Gather and write the packed rows of the linears of ``block``.

        Raises:
            UserError: on every rank: no space or no permission.
        """
        whole: dict[str, Tensor] = {}
        for source, linear in _list_linears(block).items():
            packed = engine.gather_parameter(linear.packed)
            if self.world.is_first:
                whole[source] = packed.contiguous()

        def write() -> None:
            hashes = {source: _hash_tensor(packed) for source, packed in whole.items()}
            data = safetensors.torch.save(whole, {"hashes": json.dumps(hashes)})
            write_atomically(self._get_path(number), data)

        self.world.run_on_first("keep a solved block", write)

    def remove(self) -> None:
        """Remove the directory: the packed base is written."""
        self.world.run_on_first(
            "remove the solved blocks", lambda: shutil.rmtree(self.directory, ignore_errors=True)
        )

    def _get_path(self, number: int) -> Path:
        return self.directory / f"block-{number:05d}.safetensors"


def _list_linears(block: nn.Module) -> dict[str, FrozenLinear]:
    return {m.source: m for m in block.modules() if isinstance(m, FrozenLinear)}


def _read_block(path: Path, linears: Mapping[str, FrozenLinear]) -> dict[str, Tensor] | None:
    """Return the packed rows of exactly these linears; None if absent, damaged or of others."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            hashes = json.loads((file.metadata() or {})["hashes"])
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = {source: tuple(linear.packed.shape) for source, linear in linears.items()}
        if {name: tuple(tensor.shape) for name, tensor in packed.items()} != shapes:
            raise ValueError("other tensors")
        if any(_hash_tensor(tensor) != hashes[name] for name, tensor in packed.items()):
            raise ValueError("altered bytes")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        log.warning("%s is damaged (%s): the block is solved again", path, error)
        return None
    return packed


def _hash_tensor(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())
