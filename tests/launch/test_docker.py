"""The Dockerfile without docker: its instructions, its paths, and its commands with doubles."""

import json
import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT

FILE = ROOT / "launch" / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"}
PROGRAMS = ("apt-get", "pip", "rm", "useradd", "mkdir", "chown")
"""Programs of the image that its build calls."""


def read_instructions() -> list[tuple[str, str]]:
    """Instruction and its text, of several lines joined."""
    lines = [line for line in FILE.read_text().splitlines() if line and line[0] != "#"]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word, rest.strip()) for word, _, rest in (s.partition(" ") for s in joined.split("\n"))
    ]


def select_texts(name: str) -> list[str]:
    return [text for word, text in read_instructions() if word == name]


def test_instructions_are_those_of_a_dockerfile() -> None:
    words = [word for word, _ in read_instructions()]
    assert set(words) == INSTRUCTIONS and words.count("FROM") == 1
    assert words.index("FROM") == 1  # after the argument that it has
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")


def test_copied_files_exist_and_are_enough_to_install() -> None:
    copied = [word for text in select_texts("COPY") for word in text.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "dist_peft"}
    assert needed <= set(copied) and "constraints.txt" in copied


def test_arguments_are_declared_and_versions_are_those_of_the_tests() -> None:
    values = dict(text.split("=") for text in select_texts("ARG"))
    assert values["DEVICE"] == "cpu" and set(values) == {"PYTHON", "DEVICE", "TORCH"}
    assert f"torch=={values['TORCH']}" in (ROOT / ".ci" / "run").read_text()
    assert PROJECT["requires-python"] == f">={values['PYTHON']}"
    assert select_texts("FROM") == ["python:${PYTHON}-slim"]


def run_build(directory: Path, device: str) -> tuple[int, list[list[str]]]:
    """Run all RUN instructions in a shell whose programs write down their arguments."""
    calls = directory / "calls"
    calls.touch()
    for name in PROGRAMS:
        double = directory / name
        double.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name}" "$@" "" >> {calls}\n')
        double.chmod(stat.S_IRWXU)
    script = "set -e\n" + "\n".join(select_texts("RUN"))
    variables = {"PATH": str(directory), "DEVICE": device, "TORCH": "2.13.0"}
    done = subprocess.run(
        ["/bin/sh", "-c", script], env=variables, capture_output=True, check=False
    )
    return done.returncode, [call.split("\n") for call in calls.read_text().split("\n\n") if call]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_install_torch_and_extras_that_exist(device: str, tmp_path: Path) -> None:
    code, calls = run_build(tmp_path, device)
    assert code == 0
    torch, package = (call for call in calls if call[0] == "pip")
    assert torch[-1] == "torch==2.13.0"
    assert ("https://download.pytorch.org/whl/cpu" in torch) is (device == "cpu")
    match = re.fullmatch(r"/source\[([a-z,]+)\]", package[-1])
    assert match is not None
    extras = set(match[1].split(","))
    assert extras <= set(PROJECT["optional-dependencies"])
    assert ("triton" in extras) is (device == "cuda")
    assert package[package.index("-c") + 1] == "/source/constraints.txt"
    assert {call[0] for call in calls} == set(PROGRAMS)  # no other program was called


def test_another_device_is_refused(tmp_path: Path) -> None:
    code, calls = run_build(tmp_path, "tpu")
    assert code == 2 and not [call for call in calls if call[0] == "pip"]


def test_command_and_variables_are_the_programs_own() -> None:
    (command,) = select_texts("CMD")
    assert json.loads(command)[0] in PROJECT["scripts"]
    (variables,) = select_texts("ENV")
    assert "DIST_PEFT_CACHE=" in variables
    assert "DIST_PEFT_CACHE" in "".join(p.read_text() for p in (ROOT / "dist_peft").rglob("*.py"))
    page = (ROOT / "docs" / "launchers.md").read_text()
    assert f"docker build -f {os.path.relpath(FILE, ROOT)} --build-arg DEVICE=cuda" in page
