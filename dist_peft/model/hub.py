"""From ``base.path`` to a local directory and its tokenizer."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_files
from dist_peft.core.log import ONCE
from dist_peft.core.progress_beat import enter_phase
from dist_peft.model.hub_download import download_snapshot

__all__ = [
    "REFUSALS",
    "Tokenizer",
    "download_base",
    "format_library_error",
    "load_tokenizer",
    "public_base_name",
    "read_json_object",
    "refuse_hub_kernels",
    "resolve_base_directory",
    "save_tokenizer",
    "warn_of_trusted_code",
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
"""Exceptions of ``transformers`` for files with unexpected contents."""

_JSON_OBJECTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

_downloaded: dict[tuple[str, str | None], Path] = {}
"""Snapshots with weights that ``download_base`` has found, by hub id and revision: later calls ask
the hub for nothing, which refuses hundreds of ranks that ask at once."""


def download_base(base: BaseConfig) -> Path:
    """Return the base's directory; a hub id is looked up once in this process.

    For runs of several ranks, in ``World.run_node_first``: the first rank of a node downloads, the
    others find its files in the hub cache.

    Raises:
        UserError: neither a directory nor a hub id that is available.
        StopRequested: a signal came; downloaded files stay in the hub cache.
    """
    directory = resolve_base_directory(base)
    if not Path(base.path).expanduser().is_dir():
        _downloaded[base.path, base.revision] = directory
    return directory


def resolve_base_directory(base: BaseConfig, *, weights: bool = True) -> Path:
    """Return the base's directory; a hub id is downloaded into the hub cache if missing there.

    Args:
        weights: download them too; False: configuration, tokenizer and code alone.

    Raises:
        UserError: neither a directory nor a hub id that is available.
        StopRequested: a signal came; downloaded files stay in the hub cache.
    """
    if (known := _downloaded.get((base.path, base.revision))) is not None:
        return known
    path = Path(base.path).expanduser()
    if path.is_dir():
        refuse_special_files(path)
        return path
    if path.exists():
        raise UserError(f"base.path {path} is a file; give the directory that holds config.json")
    if base.path.count("/") != 1 or base.path.startswith((".", "/", "~")):
        raise UserError(
            f"base.path {base.path} does not exist (looked in {Path.cwd()}); give the directory "
            "of a model, or a hub id as org/name"
        )
    try:
        with enter_phase("download", math.inf):  # the hub's client has time limits of its own
            return download_snapshot(base.path, base.revision, weights=weights)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"base.path {base.path} is neither a local directory nor available on the hub: {first}"
        ) from None


def warn_of_trusted_code(base: BaseConfig) -> None:
    """Warn, before any file of the base is opened, that its code will run."""
    if base.trust_remote_code:
        log.warning(
            "base.trust_remote_code is on: code shipped with %s will run", base.path, extra=ONCE
        )


def public_base_name(base: BaseConfig) -> str:
    """Return a name of the base for adapter files: an absolute directory, or the hub id."""
    path = Path(base.path).expanduser()
    return str(path.resolve()) if path.is_dir() else base.path


def load_tokenizer(
    directory: Path, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Tokenizer:
    """Load the base's tokenizer.

    Args:
        gguf_file: name of a GGUF file in ``directory`` that holds it.

    Raises:
        UserError: tokenizer files are missing or unreadable.
    """
    for name in _JSON_OBJECTS:
        if (directory / name).is_file():
            read_json_object(directory / name)
    try:
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # the class that tokenizers raise for contents that they cannot use
        if type(error) is not Exception and not isinstance(error, (*REFUSALS, RuntimeError)):
            raise
        raise UserError(
            f"cannot load the tokenizer of {directory}: {format_library_error(error)}; get its "
            "tokenizer files again"
        ) from None


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
    """Read the JSON object in ``path``.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
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
    """Refuse a ``config.json`` that names a kernel repository.

    ``transformers`` downloads an attention or experts implementation called ``org/name`` from the
    Hub and imports it, where the ``kernels`` package is installed: that is remote code, too.

    Args:
        described: the contents of ``file``, or a part of them.

    Raises:
        UserError: it names one.
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


def format_library_error(error: Exception) -> str:
    """Return the first line of a library's error, with its class where the text is too short."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with its own code, which runs only with base.trust_remote_code=true on "
            "the command line (merge, export: --trust-remote-code)"
        )
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
