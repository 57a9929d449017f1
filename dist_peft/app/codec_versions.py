"""The version of the codec that an adapter, a merged directory or a checkpoint was made with.

The base of a run is quantized again each time it is loaded: for a merge, an export, a resumed run.
``base.quant`` names every parameter of that, but not the code. ``codec_version`` of the codec
(``quant.codec``) is raised whenever its bytes or decoded values change, is kept in
``dist_peft.json``, ``merge_record.json`` and ``base.json``, and is compared here.
"""

from collections.abc import Mapping
from typing import Any

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.quant.codec import get_codec_version

__all__ = [
    "describe_codec",
    "describe_other_codec",
    "read_codec_version",
    "refuse_other_codec",
]

_KEY = "codec_version"


def describe_codec(quant: QuantConfig | None) -> dict[str, int]:
    """Return the entries for a JSON file of an adapter; empty for a base that is not quantized."""
    return {} if quant is None else {_KEY: get_codec_version(quant.kind)}


def read_codec_version(about: Mapping[str, Any], where: str) -> int:
    """Return the version in the contents of such a file; 1 for files of before there were any.

    Args:
        where: the file, for messages.

    Raises:
        UserError: it is not a positive integer.
    """
    found = about.get(_KEY, 1)
    if type(found) is not int or found < 1:
        raise UserError(f"{where} is damaged: {_KEY} is {found!r}, no version; get it again")
    return found


def describe_other_codec(about: Mapping[str, Any], kind: str, where: str) -> str | None:
    """Return how the version in ``about`` differs from that of this program; None if it does not.

    Args:
        about: contents of the file.
        kind: ``base.quant.kind`` that the base is quantized with now.
        where: the file, for messages.

    Raises:
        UserError: as ``read_codec_version``.
    """
    made, mine = read_codec_version(about, where), get_codec_version(kind)
    if made == mine:
        return None
    return f"was trained on a base of {kind} codec version {made}, and this program has {mine}"


def refuse_other_codec(
    about: Mapping[str, Any], quant: QuantConfig | None, subject: str, where: str
) -> None:
    """Check that a base quantized now has the numbers that the adapter was trained on.

    Args:
        about: contents of a file that ``describe_codec`` is written to.
        quant: how the base is quantized now; None: it is not.
        subject: in messages, such as ``adapter DIR``.
        where: the file, for messages.

    Raises:
        UserError: another version of the codec packs or decodes other numbers.
    """
    if quant is None or (why := describe_other_codec(about, quant.kind, where)) is None:
        return
    made = about.get("dist_peft")
    fix = "the version that trained it" if made is None else f"dist_peft {made}, which trained it"
    raise UserError(f"{subject} {why}: the quantized weights would be others; use {fix}")
