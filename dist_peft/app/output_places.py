"""Places where a command must not write: inside a model, an adapter, or the parts of a run.

What lies there is read by other commands, replaced by the next run, or taken for a part of it: a
merged model in ``RUN/base`` is the base that GPTQ has solved for the run, one in
``RUN/checkpoints/step-000010`` a checkpoint, and ``probe.safetensors`` of a run a file of the base
in whose directory it was started.
"""

import os
from pathlib import Path

from dist_peft.core.errors import UserError

__all__ = ["refuse_taken_place", "refuse_unwritable_file"]

_PARTS_OF_A_RUN = ("adapter", "base", "checkpoints", "tensorboard")


def refuse_taken_place(path: Path, option: str, *, new: bool = True) -> None:
    """Refuse a directory or file to write that lies inside of something else.

    Args:
        path: need not exist; links are followed.
        option: what names it, for the message: ``--out`` or ``save.dir``.
        new: ``path`` itself is to be created; False: it may exist, and must not be such a place.

    Raises:
        UserError: it lies in a model's directory, an adapter's, or a part of a run.
    """
    where = path.expanduser().resolve()
    within = list(where.parents)
    for directory in within if new else [where, *within]:
        if (kind := _describe_place(directory)) is not None:
            raise UserError(f"{option} {path} lies in {kind} {directory}; choose another place")
    for part, run in zip([where, *within], within, strict=False):
        if part.name in _PARTS_OF_A_RUN and _is_run(run):
            raise UserError(
                f"{option} {path} lies in {part.name}/ of the run {run}, which other commands read "
                "and the next run replaces; choose another place, such as "
                f"{run / 'merged'}"
            )


def refuse_unwritable_file(path: Path, option: str, *endings: str) -> None:
    """Refuse a file to write, before long work, that could not be written or is of another kind.

    Args:
        option: its name for the message, such as ``--html``.
        endings: that the file's name may have, such as ``.html``; none: any.

    Raises:
        UserError: no such directory, no permission, another ending, or a directory in its place.
    """
    if endings and path.suffix not in endings:
        raise UserError(f"{option} {path}: give a file name that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; give the name of a file")
    parent = path.expanduser().absolute().parent
    if not parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {parent}; make it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path}: {parent} cannot be written to; choose another place")
    refuse_taken_place(path, option)


def _describe_place(directory: Path) -> str | None:
    if (directory / "adapter_config.json").is_file() or (directory / "dist_peft.json").is_file():
        return "the adapter's directory"
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return "the model's directory"
    return None


def _is_run(directory: Path) -> bool:
    return (directory / "config.yaml").is_file() and (
        (directory / "checkpoints").is_dir() or (directory / "adapter").is_dir()
    )
