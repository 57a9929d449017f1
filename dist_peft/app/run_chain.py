"""Write the chain of hashes of an exact run (``train.state_chain``) while it trains.

Other runs have none: their states cannot be computed a second time, so that a chain of them could
not be audited, and hashing takes a second for each GB of adapters and moments.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.model_setup import ModelSetup
from dist_peft.core.agreement import hash_json_value
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.text_exchange import all_gather_texts
from dist_peft.core.world import World
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.writer import write_atomically
from dist_peft.train.checkpoint_hash import hash_checkpoint_state
from dist_peft.train.run_position import RunPosition
from dist_peft.train.state_chain import (
    CHAIN_FILE,
    ChainLink,
    ChainOrigin,
    StateChain,
    hash_file_bytes,
    hash_records,
    read_chain,
)
from dist_peft.train.step_metrics import StepMetrics

__all__ = ["RunChain", "hash_adapter_files", "hash_base_files", "hash_small_files"]

log = logging.getLogger("dist_peft")

_NOT_SEALED = (CHAIN_FILE, "README.md", "files.json")
"""Files that are written later or again: the chain itself, the card, the checksums."""


@dataclass
class RunChain:
    """The chain of one run; without ``train.exact`` it does nothing."""

    config: RunConfig
    setup: ModelSetup
    loaders: DataLoaders
    world: World
    _chain: StateChain | None = None
    _records: list[StepMetrics] = field(default_factory=list)

    def begin(self, resume_from: Path | None) -> None:
        """Continue the chain of a checkpoint, or begin one. Collective.

        Raises:
            UserError: on every rank: the checkpoint's chain is damaged.
        """
        if not self.config.train.exact:
            return
        self._records.clear()
        found, step = None, 0
        with self.world.raise_together("read the chain of hashes"):
            if resume_from is not None:
                found = read_chain(resume_from)
                step = int(resume_from.name.rpartition("-")[2])
        if found is None:
            base = hash_base_files(self.setup.skeleton.index, self.setup.directory, self.world)
            origin = ChainOrigin(step, base, cast(Any, self.loaders.train.rows).fingerprint)
            found = StateChain(origin)
        self._chain = found

    def add_record(self, record: StepMetrics) -> None:
        """Note the losses of a step, for the link of the next checkpoint."""
        if self._chain is not None:
            self._records.append(record)

    def make_seal(self, position: RunPosition) -> Callable[[Path], Mapping[str, str]] | None:
        """Return the function that adds the link of a checkpoint that is being written.

        It is called on the first rank, perhaps in a thread; at most one at a time.
        """
        if self._chain is None:
            return None
        records, self._records = self._records, []
        return partial(self._seal_checkpoint, position, hash_records(records))

    def _seal_checkpoint(
        self, position: RunPosition, records: str, directory: Path
    ) -> Mapping[str, str]:
        assert self._chain is not None
        before = self._chain.cut_after(position.step - 1)
        link = ChainLink(
            position.step,
            hash_json_value(json.loads(json.dumps(asdict(position)))["values"]),
            hash_checkpoint_state(directory),
            records,
            hash_small_files(directory),
        )
        self._chain = before.add_link(link)
        log.info("step %d: chain of hashes at %s", position.step, self._chain.last_hash)
        return {CHAIN_FILE: self._chain.to_json()}

    def seal_adapter(self, directory: Path) -> None:
        """Write the chain of the finished adapter; on the first rank, after its last file."""
        if self._chain is not None:
            sealed = self._chain.add_adapter(hash_adapter_files(directory))
            write_atomically(directory / CHAIN_FILE, sealed.to_json())


def hash_small_files(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint that holds no tensors, by name."""
    return {
        file.name: hash_file_bytes(file)
        for file in sorted(checkpoint.iterdir())
        if file.suffix in (".json", ".jinja") and file.name not in _NOT_SEALED
    }


def hash_adapter_files(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an adapter's directory, but for chain and card, by path
    in it."""
    return {
        str(file.relative_to(directory)): hash_file_bytes(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in _NOT_SEALED
    }


@enter_phase("hash the base", SETUP_PATIENCE)
def hash_base_files(index: SafetensorsIndex, directory: Path, world: World) -> dict[str, str]:
    """Return the SHA-256 of the base's weights and ``config.json`` by name. Collective.

    Ranks share the files out by their number, so that a base in one file is read by one rank.

    Raises:
        UserError: on every rank: a file cannot be read.
    """
    files = {Path(info.file) for info in index.tensors.values()} | {directory / "config.json"}
    own = sorted(file for file in files if file.is_file())[world.rank :: world.size]
    found: dict[str, str] = {}
    with world.raise_together("hash the base"):
        try:
            found = {file.name: hash_file_bytes(file) for file in own}
        except OSError as error:
            raise UserError(f"cannot read the base: {error}") from None
    everyone = [json.loads(text) for text in all_gather_texts(json.dumps(found))]
    return dict(sorted((name, value) for part in everyone for name, value in part.items()))
