"""Keep secrets out of files and messages.

Known are: values of the environment whose names say so (``HF_TOKEN``, ``WANDB_API_KEY``,
``AWS_SECRET_ACCESS_KEY``, ...), values that ``register_secret`` was given (those that a
configuration refers to), tokens of well-known forms, and the user part of a URL. ``redact_text``
replaces each by ``***``.
"""

import os
import re
from functools import lru_cache

__all__ = ["is_secret_name", "redact_text", "register_secret"]

MASK = "***"

SHORTEST = 8
"""A shorter value is no secret: its replacement would garble other text."""

_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|PASS|PW|CREDENTIALS?|AUTH)(_|\d|$)",
    re.IGNORECASE,
)

_SECRET_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"  # AWS
    r"|\bxox[abps]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bwandb_v\d_\w{20,}"
    r"|(?<=://)[^/@\s:'\"]*:[^/@\s'\"]+(?=@)"  # user:password of a URL
)

_registered: set[str] = set()


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name holds a secret, such as ``HF_TOKEN``."""
    return _SECRET_NAME.search(name) is not None


def register_secret(value: str) -> None:
    """Redact ``value`` from now on, unless it is short, a number or an existing path."""
    is_number = re.fullmatch(r"[\d.eE+-]*", value) is not None
    if len(value) >= SHORTEST and not is_number and not os.path.exists(value):
        _registered.add(value)


def redact_text(text: str) -> str:
    """Return ``text`` with every known secret replaced."""
    for name in os.environ:  # few are secret, and only the values of those are read
        if is_secret_name(name):
            value = os.environ.get(name, "")
            if len(value) >= SHORTEST and value in text:
                register_secret(value)
    for value in sorted(_registered, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _SECRET_FORMS.sub(MASK, text)
