"""Guides name real things: YAML blocks are configurations, and commands have these options."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = ("tutorial.md", "howto_clusters.md", "transcripts/own_data.md", "transcripts/slurm.md")
REQUIRED: dict[str, Any] = {"base": {"path": "b"}, "data": {"train": ["d.jsonl"]}}


def read_yaml_blocks(page: str) -> list[tuple[str, dict[str, Any]]]:
    """Title and content of the titled YAML blocks of a page."""
    found = re.findall(r'```yaml title="([\w.]+)"\n(.*?)```', page, re.DOTALL)
    return [(title, yaml.safe_load(text)) for title, text in found]


def complete_overrides(tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with the two required keys, where it has none of its own."""
    return {
        **tree,
        **{section: {**keys, **tree.get(section, {})} for section, keys in REQUIRED.items()},
    }


def list_verb_options() -> dict[str, set[str]]:
    """Long options by verb, of ``docs/commands.md``, which a test compares with the program."""
    sections = re.split(r"^## ", (DOCS / "commands.md").read_text(), flags=re.MULTILINE)[1:]
    return {
        section.split("\n", 1)[0].strip(): set(re.findall(r"--[a-z][a-z-]*", section))
        for section in sections
    }


def list_commands(page: str) -> list[list[str]]:
    """Words from the verb on of each ``dist-peft`` command in the code blocks of a page."""
    blocks = "\n".join(re.findall(r"```(?:bash|text transcript.*?)\n(.*?)```", page, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    found = [re.search(r"\b(?:dist-peft|dist_peft) ([a-z].*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("name", GUIDES)
def test_yaml_blocks_are_configurations(name: str) -> None:
    for title, tree in read_yaml_blocks((DOCS / name).read_text()):
        parse_config(complete_overrides(tree) if title == "overrides" else tree)


def test_a_wrong_key_of_a_guide_is_found() -> None:
    ((title, tree),) = read_yaml_blocks('```yaml title="overrides"\nsave: {evry: 1}\n```')
    assert title == "overrides"
    with pytest.raises(UserError, match=r"save\.evry"):
        parse_config(complete_overrides(tree))


def test_the_srun_lines_of_containers_fit_into_the_job_script() -> None:
    """In place of the script's own they leave valid bash, with the process that signals go to."""
    script = (ROOT / "dist_peft/app/templates/slurm_run.sh").read_text()
    own = r"^    srun --kill-on-bad-exit=1 \\\n.*&$"
    assert len(re.findall(own, script, re.MULTILINE)) == 1
    page = (DOCS / "howto_clusters.md").read_text()
    lines = re.findall(r"^srun --kill-on-bad-exit=1 \\\n(?:.*\\\n)*.* &$", page, re.MULTILINE)
    assert [("--container-image" in line, "apptainer exec" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]
    for line in lines:
        assert line.endswith('python -m dist_peft train --config "$CONFIG" "$@" &')
        changed = re.sub(own, lambda _, line=line: line, script, flags=re.MULTILINE)
        assert changed != script
        subprocess.run(["bash", "-n"], input=changed, text=True, check=True)


@pytest.mark.parametrize("name", GUIDES)
def test_commands_have_these_options(name: str) -> None:
    options = list_verb_options()
    commands = list_commands((DOCS / name).read_text())
    assert commands
    for verb, *words in commands:
        long = {word.split("=")[0] for word in words if word.startswith("--")}
        assert long <= options[verb], f"{name}: dist-peft {verb}: {long - options[verb]}"


README = (DOCS.parent / "README.md").read_text()
MAIN_JOB = (
    "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 && "
    ".venv/bin/pip install -c constraints.txt -e . && .venv/bin/dist-peft quickstart\n"
)


def test_readme_is_a_picture_two_commands_and_links() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "!"))]
    assert len(lines) <= 20
    assert re.findall(r"```bash\n(.*?)```", README, re.DOTALL) == [MAIN_JOB, "bash .ci/run\n"]
    assert MAIN_JOB in (DOCS / "quickstart.md").read_text()
    assert "quickstart" in list_verb_options() and (DOCS.parent / ".ci" / "run").is_file()


def test_links_of_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 12
    assert not [link for link in links if not (DOCS.parent / link).exists()]
