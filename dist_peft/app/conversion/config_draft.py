"""A configuration of this project that is made of another trainer's, with the reasons.

Each setting keeps the key of the other file that it comes from, as a comment of its line. Keys
without a counterpart are listed at the top of the file, and for the caller to print.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from dist_peft.app.conversion.foreign_file import ForeignFile, is_unset
from dist_peft.core.config.io import escape_interpolations
from dist_peft.core.config.peer_keys import find_peer_key
from dist_peft.core.config.peer_values import find_peer_value, read_setting
from dist_peft.core.config.run import RunConfig
from dist_peft.core.redaction import is_secret_name, redact_text

__all__ = ["ConfigDraft", "Setting"]

_MAX_SHOWN = 60
"""Characters of a value in a comment."""


@dataclass(frozen=True)
class Setting:
    """A value, and where it comes from."""

    value: Any
    origin: str


@dataclass
class ConfigDraft:
    """Settings by key (``train.lr``), keys without a counterpart, and keys that are not needed.

    Attributes:
        unmatched: lines ``key: value -- reason``.
        needless: names.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)

    def put_setting(self, key: str, value: Any, origin: str) -> None:
        """Set ``key``; a later value replaces an earlier one."""
        self.settings[key] = Setting(value, origin)

    def put_known_value(self, key: str, name: str, given: Any, valid: tuple[str, ...]) -> None:
        """Set ``key`` to ``given``, or to the value here that says the same; else list it.

        Args:
            name: of the key in the other file.
            valid: values of ``key`` that mean the same there.
        """
        text = str(given).lower()
        if text in valid:
            self.put_setting(key, text, name)
        elif settings := find_peer_value(key, given):
            for setting in settings:
                self.put_setting(*read_setting(setting), f"{name}: {given}")
        else:
            self.list_unmatched(name, given, f"{key} has no such value; its default is kept")

    def list_unmatched(self, name: str, value: Any, reason: str) -> None:
        """List a key without a counterpart, unless its value switches nothing on."""
        if not is_unset(value):
            shown = "***" if is_secret_name(name) else redact_text(str(value))
            shown = " ".join(shown.split())
            if len(shown) > _MAX_SHOWN:
                shown = shown[: _MAX_SHOWN - 3] + "..."
            self.unmatched.append(f"{name}: {shown} -- {reason}")

    def list_needless(self, name: str, value: Any) -> None:
        """List a key that may be left out here, unless its value switches nothing on."""
        if not is_unset(value):
            self.needless.append(name)

    def copy_remaining_keys(self, file: ForeignFile, needless: frozenset[str]) -> None:
        """Copy or list every key that was not taken yet, by the table of ``peer_keys``.

        Args:
            needless: keys of the trainer that ask for nothing which is not so here, too.
        """
        for name in file.list_names():
            value, peer = file.take_value(name), find_peer_key(name)
            if is_unset(value):
                continue
            if name in needless or (peer is not None and peer.is_needless):
                self.needless.append(name)
            elif peer is None:
                self.list_unmatched(name, value, "no counterpart here")
            elif peer.is_copied and peer.key is not None and peer.key not in self.settings:
                self.put_setting(peer.key, value, name)
            else:
                self.list_unmatched(name, value, peer.describe())

    def build_tree(self) -> dict[str, Any]:
        """Return the settings as a plain tree."""
        tree: dict[str, Any] = {}
        for key, setting in self.settings.items():
            section, _, name = key.partition(".")
            if name:
                tree.setdefault(section, {})[name] = setting.value
            else:
                tree[section] = setting.value
        return tree

    def format_file(self, title: str) -> str:
        """Return the YAML file: ``title``, keys without a counterpart, and commented settings."""
        lines = [f"# {title}", "# A comment names the key that a value comes from."]
        if self.unmatched:
            lines += ["#", "# Without a counterpart here:"]
            lines += [f"#   {line}" for line in self.unmatched]
        if self.needless:
            lines += ["#", f"# Not needed here: {', '.join(self.needless)}"]
        for section in RunConfig.model_fields:
            keys = [key for key in self.settings if key.split(".")[0] == section]
            if keys:
                lines += ["", *self._format_section(section, keys)]
        return "\n".join(lines) + "\n"

    def _format_section(self, section: str, keys: list[str]) -> Iterator[str]:
        if keys == [section]:
            yield from _format_setting(section, self.settings[section])
            return
        yield f"{section}:"
        for key in keys:
            name = key.partition(".")[2]
            yield from (f"  {line}" for line in _format_setting(name, self.settings[key]))


def _format_setting(name: str, setting: Setting) -> Iterator[str]:
    text = OmegaConf.to_yaml(OmegaConf.create({name: escape_interpolations(setting.value)}))
    lines = text.rstrip("\n").split("\n")
    comment = f"# {redact_text(setting.origin)}"
    is_nested = isinstance(setting.value, dict | list)
    if len(lines) > 1 and not is_nested:  # no comment fits into a text of several lines
        yield comment
        yield from lines
        return
    yield f"{lines[0]}  {comment}"
    yield from lines[1:]
