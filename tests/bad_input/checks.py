"""What must be true of a command that was given a bad input."""

import re
import shutil
from pathlib import Path

from tests.bad_input.case import Row
from tests.support.forked_commands import Ended, run_forked

_MESSAGE = re.compile(r"^dist-peft(?: \w+)?: ", re.MULTILINE)
_MAY_GROW = ("log.txt", "run_state.json")
"""A run that had begun says in these files how it ended."""


def check_row(row: Row, workspace: Path, place: Path) -> str:
    """Damage a copy of ``workspace`` at ``place``, run the command and check all; give its message.

    Raises:
        AssertionError: with what the command printed.
    """
    shutil.copytree(workspace, place, symlinks=True)
    if row.damage is not None:
        row.damage(place)
    before = list_contents(place)
    ranks = run_forked(
        row.arguments,
        place,
        ranks=row.ranks,
        env=row.env,
        rank_arguments=row.rank_args,
        rank_env=row.rank_env,
    )
    printed = "\n".join(
        f"-- rank {n}: {e.code}\n{e.stdout[-300:]}{e.stderr[-2500:]}" for n, e in enumerate(ranks)
    )
    assert [e.code for e in ranks] == [2] * row.ranks, f"exit codes\n{printed}"
    messages = [find_message(ended) for ended in ranks]
    told = [m for m in messages if m is not None]
    assert told, f"no message\n{printed}"
    for message in told:
        missing = [w for w in row.words if w.lower() not in message.lower()]
        assert not missing, f"{missing} not in the message\n{printed}"
    after = list_contents(place)
    check_unchanged(before, after, told)
    log = before.get("run/log.txt", b"(special)")
    if row.command == "resume" and not log.startswith((b"(special)", b"link to ")):
        assert after["run/log.txt"] != log, "the log of the earlier run does not say it"
    return told[0]


def find_message(ended: Ended) -> str | None:
    """Return the one message of a process, which is the last thing that it printed."""
    text = ended.stderr
    assert "Traceback" not in text and "Traceback" not in ended.stdout, f"a traceback\n{text}"
    starts = [match.start() for match in _MESSAGE.finditer(text)]
    if not starts:
        return None
    assert len(starts) == 1, f"{len(starts)} messages\n{text}"
    message = text[starts[0] :].strip()
    assert message.count("\n") < 4 and len(message) < 2000, f"no readable line\n{message}"
    return message


def list_contents(root: Path) -> dict[str, bytes]:
    """Return everything below ``root``: the bytes of files, and what else there is."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}".encode()
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = b"(directory)" if path.is_dir() else b"(special)"
    return found


def check_unchanged(before: dict[str, bytes], after: dict[str, bytes], told: list[str]) -> None:
    """Check that no file is lost, changed or half written, and how a log that grew ends.

    A whole entry of the token cache may be there afterwards.
    """
    cache = re.compile(r"cache(/tokens(/\.[0-9a-f]{32}\.lock|/[0-9a-f]{32}(/[\w.]+)?)?)?$")
    assert not (lost := sorted(before.keys() - after.keys())), f"lost: {lost}"
    for name, content in after.items():
        path = Path(name)
        if content == before.get(name) or cache.fullmatch(name):
            continue
        begun = path.name in _MAY_GROW or (content == b"(directory)" and name not in before)
        begun = begun and f"{path.parent if path.name in _MAY_GROW else path}/log.txt" in after
        assert begun, f"{name} was {'changed' if name in before else 'left'}"
        if path.name == "log.txt":
            assert content.startswith(before.get(name, b"")), f"{name} was rewritten"
            last = content.decode().strip().rpartition("\n")[2]
            assert any(m.removeprefix("dist-peft: ").split("\n")[-1] in last for m in told), last
        elif path.name == "run_state.json":
            assert b'"running"' not in content, content
