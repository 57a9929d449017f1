"""Answer prompts one after another: as text, as JSON lines, with the adapter, without, or both.

Every rank runs a session with the same prompts; the one that has an output writes.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, get_args

from dist_peft.app.chat_model import ChatModel
from dist_peft.core.errors import UserError
from dist_peft.model.generation import Sampling

__all__ = ["HELP_LINE", "AdapterChoice", "ChatSession", "read_stdin_lines"]

AdapterChoice = Literal["on", "off", "both"]

HELP_LINE = "/on, /off, /both: the adapter; /reset: a new conversation; /quit or Ctrl-D: the end"

_TITLES = {True: "with the adapter", False: "base alone"}


def read_stdin_lines(prompt: str) -> Iterator[str]:
    """Yield the lines of the standard input that are not blank.

    Args:
        prompt: shown before each, on a terminal.
    """
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  # line editing and history of input()

    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return
        if line.strip():
            yield line


@dataclass
class ChatSession:
    """The answers of a model to a sequence of prompts.

    Attributes:
        adapter: ``on``, ``off``, or ``both``, one answer after the other.
        system: system message of every conversation; needs a template.
        as_json: write a line of JSON an answer, instead of text as it is generated.
        output: None on ranks that write nothing.
    """

    model: ChatModel
    sampling: Sampling
    adapter: AdapterChoice = "on"
    system: str | None = None
    as_json: bool = False
    output: TextIO | None = None
    _turns: dict[bool, list[dict[str, Any]]] = field(default_factory=dict)
    """Earlier messages of the conversation, with the adapter and without."""

    def __post_init__(self) -> None:
        if self.system is not None and self.model.template is None:
            raise UserError(
                "--system needs a chat template, and prompts are continued as they are"
                f"{'; pass --template' if '--template' in self.model.choice else ''}"
            )

    def answer_separately(self, prompts: Iterable[str]) -> None:
        """Answer each prompt as a conversation of its own.

        Raises:
            UserError: a prompt cannot be answered.
        """
        for prompt in prompts:
            self._turns.clear()
            self.answer_prompt(prompt)

    def converse(self, prompts: Iterable[str]) -> None:
        """Answer prompts as one conversation, with the commands of ``HELP_LINE``.

        A prompt that cannot be answered is reported, and the next one is read.
        """
        for prompt in prompts:
            command = prompt.strip()
            if command == "/quit":
                return
            if command.startswith("/"):
                self._obey_command(command)
                continue
            try:
                self.answer_prompt(prompt)
            except UserError as error:
                self._write(f"{error}\n")

    def _obey_command(self, command: str) -> None:
        name = command.removeprefix("/")
        if name in get_args(AdapterChoice):
            self.adapter = name  # type: ignore[assignment]
        if name in get_args(AdapterChoice) or name == "reset":
            self._turns.clear()  # the two sides of a conversation have the same turns
            return
        self._write(f"{HELP_LINE}\n")

    def answer_prompt(self, prompt: str) -> None:
        """Answer one prompt with each side. Collective.

        Raises:
            UserError: it cannot be answered.
        """
        sides = {"on": (True,), "off": (False,), "both": (True, False)}[self.adapter]
        for side in sides:
            if len(sides) > 1 and not self.as_json:
                self._write(f"[{_TITLES[side]}]\n")
            self._answer_side(prompt, side)

    def _answer_side(self, prompt: str, side: bool) -> None:
        begun = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [*self._turns.get(side, begun), {"role": "user", "content": prompt}]
        ids = self.model.encode_messages(turns)
        first = time.perf_counter()
        show = None if self.as_json or self.output is None else self._write
        tokens = self.model.generate_answer(ids, self.sampling, adapter=side, show=show)
        seconds = time.perf_counter() - first
        text = self.model.decode_answer(tokens)
        self._turns[side] = [*turns, {"role": "assistant", "content": text}]
        if not self.as_json:
            self._write("\n")
            return
        answer = {
            "prompt": prompt,
            "adapter": "on" if side else "off",
            "text": text,
            "prompt_tokens": len(ids),
            "token_ids": tokens,
            "seconds": round(seconds, 3),
        }
        self._write(json.dumps(answer, ensure_ascii=False) + "\n")

    def _write(self, text: str) -> None:
        if self.output is not None:
            self.output.write(text)
            self.output.flush()
