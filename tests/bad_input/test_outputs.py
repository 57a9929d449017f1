"""Each kind of output directory: a kill before it is published, and a disk that is full then.

The older output stays as it was, byte for byte, or there is none; after the full disk nothing is
left of the new one. ``tests/store/test_publish.py`` fills a real disk at each write, and
``tests/faults`` hits exports at random moments, those to GGUF too.
"""

import errno
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from unittest import mock

import pytest

from dist_peft.app.cli import main
from dist_peft.core.log import close_log
from dist_peft.store import publish
from tests.bad_input.case import COMMANDS
from tests.bad_input.checks import list_contents
from tests.support.curves import skip_curves
from tests.support.dist import make_process_context

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Output:
    """A command and the directory that it publishes; ``older``: it replaces one."""

    words: Sequence[str]
    directory: str = "out"
    older: bool = False


def _export(form: str) -> Output:
    words = ("export", "--format", form, "--run", "run", "--out", "out", "--no-verify")
    return Output((*words, "--overwrite"), older=True)


OUTPUTS = {
    "merge": Output((*COMMANDS["merge"], "--overwrite"), older=True),
    "peft": _export("peft"),
    "mlx": _export("mlx"),
    "combine": Output(COMMANDS["combine"]),
    "quantize": Output(COMMANDS["quantize"]),
    "adapter": Output(COMMANDS["resume"], "run/adapter", older=True),
    "full": Output((*COMMANDS["train"], "adapter={kind: full}"), "new/adapter"),
}


def kill_this_process(*arguments: object) -> None:
    os.kill(os.getpid(), SIGKILL)


def run_until_published(words: Sequence[str], place: Path) -> None:
    """Run a command whose process is killed in the moment of publishing."""
    os.chdir(place)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with (
        mock.patch.object(publish, "_put_in_place", side_effect=kill_this_process),
        skip_curves(),
    ):
        sys.exit(main(list(words)))


def run_in_child(words: Sequence[str], place: Path) -> int | None:
    """Return the exit code of ``run_until_published`` in a process of its own."""
    child = make_process_context().Process(target=run_until_published, args=(words, place))
    child.start()
    child.join(120)
    child.kill()
    child.join()
    return child.exitcode


def find_parts(place: Path, output: Output) -> dict[str, bytes]:
    """The output by name, and what lies in a hidden directory next to it."""
    final = Path(output.directory)
    places = (final, *(final.with_name(f".{final.name}.{end}") for end in ("partial", "replaced")))
    return {
        name: content
        for name, content in list_contents(place).items()
        if any(Path(name).is_relative_to(place) for place in places)
    }


@pytest.mark.parametrize("kind", OUTPUTS)
def test_kill_and_full_disk(
    kind: str,
    workspace: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = OUTPUTS[kind]
    shutil.copytree(workspace, place)
    if output.older and output.directory == "out":
        shutil.copytree(place / "run" / "adapter", place / "out")
    before = find_parts(place, output)
    assert output.older == bool(before)
    assert run_in_child(output.words, place) == -SIGKILL
    after = find_parts(place, output)
    left = {name for name in after if ".partial" in name}
    assert len(left) >= 2  # else it was killed before it had written
    assert {name: after[name] for name in after.keys() - left} == before

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.chdir(place)
    with mock.patch.object(publish, "_sync_tree", side_effect=full), skip_curves():
        assert main(list(output.words)) == 2
    close_log()
    last = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert last.startswith("dist-peft: disk full while writing")
    assert output.directory in last and ".partial" not in last
    assert find_parts(place, output) == before
