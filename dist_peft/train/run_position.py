"""``run.json`` of a checkpoint: position of the run and, by key, its identity."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file
from dist_peft.train.checkpoint_files import DamagedCheckpointError

__all__ = ["RunPosition", "read_position"]


@dataclass(frozen=True)
class RunPosition:
    """Position and identity of a run.

    Attributes:
        step: optimizer steps done.
        samples: global index of the next sequence in the endless data order.
        seed: the run's seed; with ``step`` it is the whole random state.
        base: fingerprint of the base's files and of how they are stored.
        values: every key of the configuration and a fingerprint of each thing that was read, by
            key (``app.run_identity``); empty in a checkpoint of format 1, which had digests only.
        nonfinite_steps: numbers of the steps, from 1, without an update because a number was not
            finite (``train.nonfinite``).
        lr_halvings: how often the learning rate was halved because of them.
        format: 4; checkpoints up to 3 do not have the two above, up to 2 no ``files.json``.
    """

    step: int
    samples: int
    seed: int
    base: str
    values: dict[str, Any]
    nonfinite_steps: list[int] = field(default_factory=list)
    lr_halvings: int = 0
    format: int = 4

    @classmethod
    def from_json(cls, tree: Any) -> Self:
        """Return the position that ``tree``, the content of a ``run.json``, describes.

        Raises:
            ValueError: ``tree`` is not the content of a ``run.json``; the message says why.
        """
        if not isinstance(tree, dict):
            raise ValueError("it holds no JSON object")
        tree = dict(tree)
        if tree.get("format") == 1:
            tree = {k: v for k, v in tree.items() if k not in ("adapter", "data")} | {"values": {}}
        if type(tree.get("format")) is int and tree["format"] < _FIRST_WITH_NONFINITE:
            tree = {"nonfinite_steps": [], "lr_halvings": 0} | tree
        for name, kind in _POSITION_TYPES.items():
            if type(tree.get(name)) is not kind:
                raise ValueError(f"{name} is {tree.get(name)!r}")
        if unknown := sorted(tree.keys() - _POSITION_TYPES.keys()):
            raise ValueError(f"{unknown[0]} is not known")
        if tree["step"] < 0 or tree["samples"] < 0:
            raise ValueError(f"step is {tree['step']}, samples {tree['samples']}")
        steps = tree["nonfinite_steps"]
        if tree["lr_halvings"] < 0 or any(type(n) is not int or n < 1 for n in steps):
            raise ValueError(f"lr_halvings is {tree['lr_halvings']}, nonfinite_steps {steps!r}")
        return cls(**tree)


_FIRST_WITH_NONFINITE = 4

_POSITION_TYPES = {
    "step": int,
    "samples": int,
    "seed": int,
    "base": str,
    "values": dict,
    "nonfinite_steps": list,
    "lr_halvings": int,
    "format": int,
}


def read_position(path: Path) -> RunPosition:
    """Read ``path/run.json``.

    Raises:
        UserError: it cannot be read, is of another format, or contradicts the directory's name.
    """
    try:
        refuse_special_file(path / "run.json")
        tree = json.loads((path / "run.json").read_text(encoding="utf-8"))
        found = tree.get("format") if isinstance(tree, dict) else None
        if type(found) is int and not 1 <= found <= RunPosition.format:
            raise UserError(
                f"checkpoint {path} has format {found}, this version reads up to "
                f"{RunPosition.format}; resume it with the version that wrote it"
            )
        position = RunPosition.from_json(tree)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {path} has an unreadable run.json: {error}"
        ) from None
    named = path.name.removeprefix("step-")
    if named != path.name and named.isdecimal() and int(named) != position.step:
        raise DamagedCheckpointError(
            f"checkpoint {path} has a run.json of step {position.step}: it was copied from "
            "elsewhere or renamed; restore its name or its run.json"
        )
    return position
