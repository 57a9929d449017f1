# ruff: noqa: RUF001
"""Miniatures of the chat templates of common families, with the tokens that they use.

They are written for these tests; each keeps what makes its family special: default system prompts,
roles that are refused, reasoning that is dropped, tool calls as JSON or as tags, what ends a turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.support.data_files import byte_tokenizer

_TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
_CHATML = ("<|im_start|>", "<|im_end|>")
_TEXT_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Family:
    """One template.

    Attributes:
        specials: control tokens. marks: added tokens that are no control tokens.
        ends: tokens that end assistant turns, as ``find_turn_ends`` finds them.
        system: takes a system message. tools: takes tool calls and their results.
        assistant_first: lets the assistant speak first.
    """

    name: str
    specials: Sequence[str]
    ends: Sequence[str]
    marks: Sequence[str] = ()
    system: bool = True
    tools: bool = False
    assistant_first: bool = True

    @property
    def template(self) -> str:
        return (_TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8").removesuffix("\n")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = byte_tokenizer(specials=self.specials)
        tokenizer.add_tokens(list(self.marks))
        tokenizer.chat_template = self.template
        return tokenizer


_DEEPSEEK = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_IM_END = ("<|im_end|>",)

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", _CHATML, _IM_END),
        Family("qwen25", _CHATML, _IM_END, marks=_TEXT_MARKS[2:], tools=True),
        Family("qwen3", _CHATML, _IM_END, marks=_TEXT_MARKS, tools=True),
        Family("qwen3_thinking", _CHATML, _IM_END, marks=_TEXT_MARKS, tools=True),
        Family("coder", _CHATML, _IM_END, marks=_TEXT_MARKS[2:], tools=True),
        Family(
            "llama31",
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            ("<|eot_id|>",),
            tools=True,
        ),
        Family("llama2", (), ("</s>",), assistant_first=False),
        Family("glm4", _GLM, ("<|user|>", "<|observation|>"), tools=True),
        Family("glm45", _GLM, ("<|user|>", "<|observation|>"), marks=_TEXT_MARKS, tools=True),
        Family(
            "mistral",
            ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            ("</s>",),
            tools=True,
            assistant_first=False,
        ),
        Family(
            "gemma2",
            ("<start_of_turn>", "<end_of_turn>"),
            ("<end_of_turn>",),
            system=False,
            assistant_first=False,
        ),
        Family(
            "gemma3",
            ("<start_of_turn>", "<end_of_turn>"),
            ("<end_of_turn>",),
            assistant_first=False,
        ),
        Family("deepseek_r1", _DEEPSEEK, _DEEPSEEK[2:3], marks=_TEXT_MARKS, tools=True),
        Family("deepseek_v31", _DEEPSEEK, _DEEPSEEK[2:3], marks=_TEXT_MARKS, tools=True),
        Family("phi4", (*_CHATML, "<|im_sep|>"), _IM_END),
        Family(
            "phi3",
            ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            ("<|end|>", "</s>"),
        ),
        Family(
            "command_r",
            (
                "<|START_OF_TURN_TOKEN|>",
                "<|END_OF_TURN_TOKEN|>",
                "<|SYSTEM_TOKEN|>",
                "<|USER_TOKEN|>",
                "<|CHATBOT_TOKEN|>",
                "<|START_RESPONSE|>",
                "<|END_RESPONSE|>",
            ),
            ("<|END_OF_TURN_TOKEN|>",),
        ),
        Family(
            "harmony",
            (
                "<|start|>",
                "<|end|>",
                "<|message|>",
                "<|channel|>",
                "<|return|>",
                "<|call|>",
            ),
            ("<|end|>", "<|return|>", "<|call|>"),
            tools=True,
        ),
        Family("zephyr", (), ("</s>",)),
        Family("marked", _CHATML, _IM_END),
        Family("marked_without_end", _CHATML, _IM_END),
    )
}
