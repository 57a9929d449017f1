"""Make generation of an exported model stop at the tokens that ended the turns in training.

``transformers`` stops at the ``eos_token_id`` of ``generation_config.json``, or of ``config.json``
if there is none; a run's ``adapter/dist_peft.json`` has ``turn_end``, the ids that ended its
training documents.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.errors import UserError
from dist_peft.model.hub import read_json_object
from dist_peft.store.writer import write_atomically

__all__ = [
    "add_stop_tokens",
    "read_stop_tokens",
    "read_turn_end_ids",
    "remove_stop_tokens",
    "warn_missing_stop_token",
]

log = logging.getLogger("dist_peft")

_GENERATION = "generation_config.json"


def read_stop_tokens(directory: Path) -> list[int]:
    """Return the token ids at which plain ``generate`` of the model in ``directory`` stops."""
    file = directory / _GENERATION
    if file.is_file() and (found := _as_id_list(read_json_object(file).get("eos_token_id"))):
        return found
    config = read_json_object(directory / "config.json")
    text = config.get("text_config")
    nested = text.get("eos_token_id") if isinstance(text, dict) else None
    return _as_id_list(config.get("eos_token_id")) or _as_id_list(nested)


def _as_id_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def read_turn_end_ids(adapter_dir: Path) -> list[int]:
    """Return ``turn_end`` of a run's adapter; empty if it is unknown.

    Raises:
        UserError: it is no list of token ids.
    """
    found = read_adapter_metadata(adapter_dir).get("turn_end")
    if found is None:
        return []
    if not isinstance(found, list) or len(ids := _as_id_list(found)) != len(found):
        raise UserError(
            f"{adapter_dir / 'dist_peft.json'} is damaged: turn_end is {found!r}, no list of token "
            "ids; get the adapter again"
        )
    return ids


def warn_missing_stop_token(directory: Path, turn_end: Sequence[int], names: Sequence[str]) -> None:
    """Warn before training if the base would not stop at the end of a document.

    Args:
        directory: directory of the base.
        turn_end: token ids that end the training documents.
        names: texts of these tokens.
    """
    stops = read_stop_tokens(directory)
    missing = [name for token, name in zip(turn_end, names, strict=True) if token not in stops]
    if missing:
        log.warning(
            "the training data end with %s, and the base's generation settings stop at token ids "
            "%s: the base with the adapter would continue after the end of its turn. Merged and "
            "exported models get the token in generation_config.json (gguf: eot_token_id); with "
            "the adapter alone pass eos_token_id to generate",
            ", ".join(map(repr, missing)),
            stops,
        )


def add_stop_tokens(adapter_dir: Path, out: Path) -> list[int]:
    """Add the run's turn-end tokens to ``eos_token_id`` of the model in ``out``.

    Its configuration must have been written before.

    Returns:
        The ids that were not there.

    Raises:
        UserError: a file is damaged, or cannot be written.
    """
    stops = read_stop_tokens(out)
    missing = [token for token in read_turn_end_ids(adapter_dir) if token not in stops]
    if not missing:
        return []
    file = out / _GENERATION
    if file.is_file():
        settings = read_json_object(file)
    else:  # the same keys that transformers derives from config.json without such a file
        config = read_json_object(out / "config.json")
        settings = {k: config[k] for k in ("bos_token_id", "pad_token_id") if k in config}
    settings["eos_token_id"] = [*stops, *missing]
    write_atomically(file, json.dumps(settings, indent=2) + "\n")
    log.info("%s also stops at token ids %s, which end the turns in training", file, missing)
    return missing


def remove_stop_tokens(out: Path, tokens: Sequence[int]) -> None:
    """Remove ids that ``add_stop_tokens`` added to the model in ``out``."""
    file = out / _GENERATION
    if tokens and file.is_file():
        settings = read_json_object(file)
        settings["eos_token_id"] = [t for t in read_stop_tokens(out) if t not in tokens]
        write_atomically(file, json.dumps(settings, indent=2) + "\n")
