"""Columns that no role reads: those with a known meaning are refused, others are logged once.

A ``label`` of KTO marks an answer as bad, ``rejected`` holds an answer that the model should not
produce, ``images`` holds inputs that the text refers to. Dropping such columns silently would
train on data other than the records describe.
"""

import string
from typing import Any

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.column_hints import suggest_chosen_columns
from dist_peft.data.left_out import WEIGHT_COLUMNS
from dist_peft.data.record_blocks import Record
from dist_peft.data.tally import Tally

__all__ = ["UnusedColumnCheck"]

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_PREFERENCE = ("chosen", "rejected")
_PARTS = ("system", "system_prompt", "history", "input", "context")
_GOOD = (True, 1, "1", "1.0", "true", "True", "yes")


class UnusedColumnCheck:
    """Check the columns of each record that its format does not read.

    Args:
        reads: columns that roles of the format read.
        format_name: such as ``chat``.
        key: configuration key of the source, such as ``data.train[0]``.

    Attributes:
        taken: columns that roles of the format read, and ignored ones.
        seen: the other columns.
    """

    def __init__(self, source: DataSource, reads: set[str], format_name: str, key: str) -> None:
        fields = string.Formatter().parse(source.template or "")
        named = {*source.columns.values(), *(name for _, name, _, _ in fields if name)}
        self._reads = reads | named | {name.partition(".")[0] for name in named}
        self._chosen = bool({"chosen"} & self._reads)
        self.taken = self._reads | {*source.ignore}
        self._format, self._key = format_name, key
        self.seen = Tally()
        self._path = source.path

    @property
    def user_notes(self) -> list[str]:
        """One-time warnings for the user."""
        names = ", ".join(
            name for name, *_ in self.seen.list_entries() if name not in WEIGHT_COLUMNS
        )
        return [f"columns of {self._path} that are not used: {names}"] if names else []

    def check_record(self, record: Record, where: object) -> None:
        """Check the unread columns of ``record`` and remember their names.

        Args:
            where: its text names the record in messages.

        Raises:
            UserError: the meaning of a column would be lost.
        """
        for name, value in record.items():
            if name in self.taken:
                continue
            if value is not None and value not in ("", [], {}):
                lost = self._find_lost_meaning(name, value, record)
                if lost:
                    raise UserError(
                        f"{where}: column {name} {lost}; or leave the column out with "
                        f"{self._key}.ignore: [{name}]{self._make_warning(name)}"
                    )
            self.seen.count(name)

    def _make_warning(self, name: str) -> str:
        """Return the consequence of ignoring column ``name``, as the end of a message."""
        if name in ("label", "kto_tag"):
            return " and train on all answers as good ones"
        if name in _PREFERENCE and self._format == "chat":
            return " and train on the assistant's turns of the conversation alone"
        return ""

    def _find_lost_meaning(self, name: str, value: Any, record: Record) -> str | None:
        """Return the information that would be lost, and the fix; None if nothing is lost."""
        if name in _MEDIA:
            return "holds images, audio or video, and only text is trained on; remove such records"
        if name in WEIGHT_COLUMNS and value not in _GOOD:
            return (
                f"is {value!r:.40}, but a record contributes to the loss as a whole or is left "
                "out: the loss is a mean over equally weighted tokens; set it to 0 or 1"
            )
        if self._format == "classification":
            return None
        if name in _PREFERENCE and not self._chosen:
            return (
                "belongs to preference data (DPO), which this training does not read; to train on "
                f"the chosen answers set {self._key}.columns: {suggest_chosen_columns(record)}"
            )
        if self._format == "text":
            return None
        if name in ("label", "kto_tag") and value in (False, 0, "0", "false", "False"):
            return (
                f"is {value!r}: in preference data (KTO) that marks an answer that the model "
                "should not produce; remove the records with a false label"
            )
        if name in _PARTS and self._format != "chat":
            role = {"context": "input", "system_prompt": "system"}.get(name)
            fix = f"map it with {self._key}.columns: {{{role}: {name}}}, or "
            return (
                "would be missing from the prompt; "
                f"{fix if self._format == 'alpaca' and role not in {None, *record} else ''}"
                f'write it with {self._key}.template, such as "{{{name}}}\\n{{...}}"'
            )
        if name == "system_prompt":
            return (
                "would be missing from the conversation; map it with "
                f"{self._key}.columns: {{system: {name}}}"
            )
        if name in ("history", "functions", "chat_template_kwargs"):
            return "would be missing from the conversation; write it into messages or tools"
        return None
