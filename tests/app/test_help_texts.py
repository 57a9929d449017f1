"""Every example of ``--help`` is a command that exists, with overrides that are valid."""

import shlex
from pathlib import Path

import pytest

from dist_peft.app.cli import COMMANDS, build_verb_parser
from dist_peft.app.help_texts import EXAMPLES, format_examples, format_sections
from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import RunConfig

LINES = [(verb, line) for verb in COMMANDS for line in EXAMPLES[verb]]


def test_every_verb_has_examples() -> None:
    assert set(EXAMPLES) >= set(COMMANDS)


@pytest.mark.parametrize(("verb", "line"), LINES, ids=[line for _, line in LINES])
def test_examples(verb: str, line: str, tmp_path: Path) -> None:
    words = shlex.split(line.partition(" > ")[0])
    argv = words[words.index("dist-peft") + 1 :]
    assert argv[0] == verb
    if "--list" in argv:  # ends the parser, like --help
        with pytest.raises(SystemExit, match="0"):
            build_verb_parser(argv).parse_args(argv)
        return
    args = build_verb_parser(argv).parse_args(argv)
    if overrides := getattr(args, "overrides", None):
        (tmp_path / "run.yaml").write_text("base: {path: m}\ndata: {train: [a]}\n")
        assert load_config(tmp_path / "run.yaml", overrides)


def test_help_shows_examples_and_sections() -> None:
    assert format_examples("merge").splitlines()[:2] == [
        "examples:",
        "  dist-peft merge --run runs/mine --out merged",
    ]
    text = format_sections()
    for name in RunConfig.model_fields:
        assert f"\n{name}: " in f"\n{text}"
    assert "kinds, with keys of their own: lora, qalora," in text
    assert max(map(len, text.splitlines())) <= 80
    parser = build_verb_parser(["train"])
    verbs = next(action for action in parser._actions if action.dest == "verb")
    assert isinstance(verbs.choices, dict)
    page = verbs.choices["train"].format_help()
    assert "path, quant, head, compute_dtype" in page and "examples:\n  dist-peft train" in page
