"""From ``base.path`` to a local directory and its tokenizer."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE

__all__ = [
    "REFUSALS",
    "Tokenizer",
    "announce_trust",
    "load_tokenizer",
    "public_name",
    "read_json_object",
    "reason",
    "refuse_hub_kernels",
    "resolve_base",
    "save_tokenizer",
]

Tokenizer = PreTrainedTokenizerBase

log = logging.getLogger("dist_peft")

REFUSALS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    StrictDataclassError,
)
"""What ``transformers`` raises for files whose contents it does not expect."""

_JSON_OBJECTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

_DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_WEIGHTS = ["*.safetensors"]


def resolve_base(base: BaseConfig, *, weights: bool = True) -> Path:
    """A directory as it is; a hub id downloaded into the hub cache (or found there).

    Args:
        weights: download them too; False: configuration, tokenizer and code alone.

    Raises:
        UserError: neither a directory nor a hub id that can be had.
    """
    path = Path(base.path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"base.path {path} is a file; give the directory that holds config.json")
    if base.path.count("/") != 1 or base.path.startswith((".", "/", "~")):
        raise UserError(
            f"base.path {base.path} does not exist (looked in {Path.cwd()}); give the directory "
            "of a model, or a hub id as org/name"
        )
    try:
        wanted = [*_DESCRIPTION, *(_WEIGHTS if weights else [])]
        return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"base.path {base.path} is no local directory and cannot be had from the hub: {first}"
        ) from None


def announce_trust(base: BaseConfig) -> None:
    """Warn, before any file of the base is opened, that its code will run."""
    if base.trust_remote_code:
        log.warning(
            "base.trust_remote_code is on: code shipped with %s will run", base.path, extra=ONCE
        )


def public_name(base: BaseConfig) -> str:
    """What others find the base by: a directory from anywhere on this machine, or the hub id."""
    path = Path(base.path).expanduser()
    return str(path.resolve()) if path.is_dir() else base.path


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The base's tokenizer.

    Raises:
        UserError: tokenizer files are missing or unreadable.
    """
    for name in _JSON_OBJECTS:
        if (directory / name).is_file():
            read_json_object(directory / name)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except REFUSALS as error:
        raise UserError(f"cannot load the tokenizer of {directory}: {reason(error)}") from None


def save_tokenizer(tokenizer: Tokenizer, directory: Path, chat_template: str) -> None:
    """Save a copy of ``tokenizer`` that formats conversations with ``chat_template``.

    Raises:
        UserError: the disk is full or the directory cannot be written.
    """
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = chat_template
    try:
        copied.save_pretrained(directory)
    except OSError as error:
        raise UserError(f"cannot write the tokenizer into {directory}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; get the base again") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged: it holds a {type(content).__name__}, not a JSON object; "
            "get the base again"
        )
    return content


def refuse_hub_kernels(described: Any, file: Path) -> None:
    """See that ``config.json`` names no kernel repository.

    ``transformers`` downloads an attention or experts implementation called ``org/name`` from the
    Hub and imports it, where the ``kernels`` package is installed: that is remote code, too.

    Args:
        described: the contents of ``file``, or a part of them.

    Raises:
        UserError: it does.
    """
    if isinstance(described, list):
        for inner in described:
            refuse_hub_kernels(inner, file)
    if not isinstance(described, dict):
        return
    for key, value in described.items():
        if "implementation" in key:
            names = list(value.values()) if isinstance(value, dict) else [value]
            for name in names:
                if isinstance(name, str) and "/" in name:
                    raise UserError(
                        f"{file} sets {key} to {name}, which transformers would download from the "
                        "Hub and run; remove the key, or, if you trust it, add "
                        "base.trust_remote_code=true to the command line"
                    )
        else:
            refuse_hub_kernels(value, file)


def reason(error: Exception) -> str:
    """The first line of a library's error; with its class where the text alone says little."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which runs only with base.trust_remote_code=true on "
            "the command line (merge, export: --trust-remote-code)"
        )
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
