"""Attention of fusions on held-out sequences: ``fusion_attention.json`` of a run.

::

    {"adapters": ["rte", "mrpc"], "layers": ["model.layers.0.output_adapters", ...],
     "counted": "target tokens", "tokens": 1432,
     "attention": [[0.41, 0.59], ...],                       layer x adapter, rows sum to 1
     "by_task": {"rte": [[0.62, 0.38], ...], ...}}           with several held-out sources

Each number is a mean over tokens: those whose prediction contributes to the loss (``target
tokens``), in classification all but the padding (``tokens``). Sums are taken over all ranks, so
that the file does not depend on their number.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dist_peft.core.errors import UserError
from dist_peft.store.writer import write_atomically

__all__ = ["FusionAttention"]

_FILE = "fusion_attention.json"
_SITES = {"attention_adapters": "attention", "output_adapters": "MLP"}

Table = list[list[float]]


@dataclass(frozen=True)
class FusionAttention:
    """Mean attention of each fusion to each adapter over held-out tokens.

    Attributes:
        adapters: names of the fused adapters.
        layers: paths of the fusions.
        counted: kind of tokens that the mean is over.
        tokens: number of tokens.
        attention: ``[layers][adapters]``.
        by_task: the same for each of several held-out sources.
    """

    adapters: list[str]
    layers: list[str]
    counted: str
    tokens: int
    attention: Table
    by_task: dict[str, Table]

    def format_layer_labels(self) -> list[str]:
        """Return a short name for each fusion: its block's number, and its place if a block has
        two."""
        several = len({path.rpartition(".")[2] for path in self.layers}) > 1
        return [
            f"{''.join(re.findall(r'[.]([0-9]+)[.]', path)[-1:])}"
            f"{' ' + _SITES[path.rpartition('.')[2]] if several else ''}"
            for path in self.layers
        ]

    def write_json(self, run_dir: Path) -> None:
        """Write ``fusion_attention.json``.

        Raises:
            UserError: the disk is full.
        """
        write_atomically(run_dir / _FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read_json(cls, run_dir: Path) -> Self | None:
        """Read ``fusion_attention.json``; None if it does not exist.

        Raises:
            UserError: the file is damaged.
        """
        path = run_dir / _FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it") from None
