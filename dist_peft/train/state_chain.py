"""A chain of SHA-256 over the states of a run: any change to one of them changes all that follow.

::

    h_0 = SHA-256(origin)             files of the base, sequences of the data, step of the start
    h_k = SHA-256(h_{k-1}, link k)    a link for each checkpoint, in the order of their steps

A link has hashes of the checkpoint's tensors, of its small files, of the configuration, and of the
recorded losses since the link before. ``chain.json`` holds the origin and all links: each
checkpoint has those up to its own, the directory of the finished adapter has all of them and hashes
of its own files. So whoever knows the last hash can tell whether anything before it was changed
(Haber & Stornetta 1991). It is no signature: who changes a file can also compute a chain that fits.
A replay of the run's steps (``app.replay``) finds that as well.

Losses are rendered as JSON, ``[step, loss, grad_norm, lr, tokens]`` a line: Python prints the
shortest decimal that reads back as the same float64.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from dist_peft.core.agreement import hash_json_value
from dist_peft.core.errors import UserError
from dist_peft.train.step_metrics import StepMetrics

__all__ = [
    "CHAIN_FILE",
    "ChainLink",
    "ChainOrigin",
    "StateChain",
    "hash_file_bytes",
    "hash_records",
    "read_chain",
]

CHAIN_FILE = "chain.json"
_FORMAT = 1


@dataclass(frozen=True)
class ChainOrigin:
    """The inputs of a run.

    Attributes:
        step: steps done when the chain began; 0, but for runs of earlier versions.
        base: SHA-256 of each file of the base by name.
        data: SHA-256 of the training sequences and their order.
    """

    step: int
    base: dict[str, str]
    data: str


@dataclass(frozen=True)
class ChainLink:
    """The state of a run after a step.

    Attributes:
        config: SHA-256 of the values of ``run.json``: configuration, inputs, versions, processor.
        state: SHA-256 of trained parameters and moments (``train.checkpoint_hash``).
        records: SHA-256 of the losses since the link before (``hash_records``).
        files: SHA-256 of the checkpoint's small files by name.
        hash: of all of this and of the link before.
    """

    step: int
    config: str
    state: str
    records: str
    files: dict[str, str]
    hash: str = ""


@dataclass(frozen=True)
class StateChain:
    """An origin and the links after it, oldest first.

    Attributes:
        adapter: SHA-256 of the files of a finished adapter by name; empty in a checkpoint.
        adapter_hash: of ``adapter`` and of the last link.
    """

    origin: ChainOrigin
    links: tuple[ChainLink, ...] = ()
    adapter: dict[str, str] = field(default_factory=dict)
    adapter_hash: str = ""

    @property
    def last_hash(self) -> str:
        """The hash that stands for all before it."""
        return self.links[-1].hash if self.links else hash_json_value(asdict(self.origin))

    def add_link(self, link: ChainLink) -> Self:
        """Return the chain with one more link, whose ``hash`` is computed."""
        return replace(self, links=(*self.links, self._seal_link(link)))

    def add_adapter(self, files: Mapping[str, str]) -> Self:
        """Return the chain of a finished adapter with these files."""
        sealed = hash_json_value([self.last_hash, dict(files)])
        return replace(self, adapter=dict(files), adapter_hash=sealed)

    def cut_after(self, step: int) -> Self:
        """Return the chain up to the link of ``step``."""
        return replace(self, links=tuple(link for link in self.links if link.step <= step))

    def _seal_link(self, link: ChainLink) -> ChainLink:
        content = {key: value for key, value in asdict(link).items() if key != "hash"}
        return replace(link, hash=hash_json_value([self.last_hash, content]))

    def find_break(self) -> str | None:
        """Return which part does not have the hash that is recorded for it; None if none."""
        known = replace(self, links=())
        for link in self.links:
            if known.links and known.links[-1].step >= link.step:
                return f"the link of step {link.step} follows that of {known.links[-1].step}"
            known = known.add_link(link)
            if known.last_hash != link.hash:
                return f"the link of step {link.step} or one before it was changed"
        if self.adapter and known.add_adapter(self.adapter).adapter_hash != self.adapter_hash:
            return "the hashes of the adapter's files were changed"
        return None

    def extends(self, other: "StateChain") -> bool:
        """Return whether this chain begins with all of ``other``."""
        count = len(other.links)
        return self.origin == other.origin and self.links[:count] == other.links

    def list_spans(self) -> list[tuple[int, ChainLink]]:
        """Return each link with the step of the one before."""
        firsts = [self.origin.step, *(link.step for link in self.links)]
        return list(zip(firsts, self.links, strict=False))

    def to_json(self) -> str:
        """Return the text of ``chain.json``."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the chain of a ``chain.json``; raises ValueError if it is none."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
            raise ValueError("it is not of a format that this version reads")
        try:
            links = tuple(ChainLink(**link) for link in tree["links"])
            found = cls(ChainOrigin(**tree["origin"]), links, tree["adapter"], tree["adapter_hash"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"it lacks something or has too much: {error}") from None
        if found.to_json() != text:
            raise ValueError("it is not as it was written")
        return found


def read_chain(directory: Path) -> StateChain | None:
    """Return the chain in ``directory``; None if it has none.

    Raises:
        UserError: it is damaged.
    """
    file = directory / CHAIN_FILE
    try:
        return StateChain.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def hash_records(records: Iterable[StepMetrics]) -> str:
    """Return the SHA-256 of losses, norms, rates and targets of steps."""
    digest = hashlib.sha256()
    for record in records:
        values: list[Any] = [record.step, record.loss, record.grad_norm, record.lr, record.tokens]
        plain = [value if math.isfinite(value) else None for value in values]
        digest.update((json.dumps(plain) + "\n").encode())
    return digest.hexdigest()


def hash_file_bytes(path: Path) -> str:
    """Return the SHA-256 of a file; raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
