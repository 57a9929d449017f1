"""From ``base.path`` to a local directory and its tokenizer."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_peft.core.config import BaseConfig
from dist_peft.core.errors import UserError

__all__ = ["Tokenizer", "load_tokenizer", "resolve_base"]

Tokenizer = PreTrainedTokenizerBase

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_base(base: BaseConfig) -> Path:
    """A directory as it is; a hub id downloaded into the hub cache (or found there).

    Raises:
        UserError: neither a directory nor a hub id that can be had.
    """
    path = Path(base.path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"base.path {path} is a file; give the directory that holds config.json")
    if base.path.count("/") != 1 or base.path.startswith((".", "/", "~")):
        raise UserError(f"base.path {base.path} does not exist")
    try:
        return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"base.path {base.path} is no local directory and cannot be had from the hub: {first}"
        ) from None


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The base's tokenizer.

    Raises:
        UserError: tokenizer files are missing or unreadable.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer of {directory}: {first}") from None
