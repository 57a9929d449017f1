"""Runs that stand still end by themselves, and say which rank it was: real processes."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from dist_peft.train.run_state import read_run_state
from tests.support import stalled_ranks as spoil
from tests.support.dist import free_port
from tests.support.tiny_runs import save_config, tiny_tree

HOST = socket.gethostname()
EXIT_SECONDS = 15
"""Granted after ``engine.stall_seconds``."""
SECONDS = r"(?:[3-9]|1\d)"
TIME = r"\(since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"

pytestmark = pytest.mark.dist


def make_config(directory: Path, **engine: Any) -> Path:
    """A run of three ranks, whose second step is not its first."""
    tree = tiny_tree(
        directory,
        engine={"stall_seconds": 3, "start_timeout_minutes": 1.5, **engine},
        train__global_batch=3,
        save__every=0,
    )
    return save_config(directory, tree)


def check_end(ranks: list[spoil.EndedRank], run_dir: Path, expected: str) -> None:
    """Every rank exits with 1 and one last line of the same text; log and state have it too."""
    for rank, ended in enumerate(ranks):
        assert ended.code == 1, ended
        assert 3 <= ended.seconds < 3 + EXIT_SECONDS
        pattern = rf"dist-peft: rank {rank} on {HOST} stops: {expected} \(stacks: .*-{rank}\.txt\)"
        assert re.fullmatch(pattern, ended.last_line), ended.text
        assert "Traceback" not in ended.text
    assert re.search(rf" ERROR rank 0 on {HOST} stops: {expected} ", read_last_line(run_dir))
    state = read_run_state(run_dir)
    assert state is not None and state.state == "failed" and state.step == 1
    assert re.search(expected, state.reason)


def read_last_line(run_dir: Path) -> str:
    return (run_dir / "log.txt").read_text().rstrip("\n").rpartition("\n")[2]


def test_a_rank_that_is_stuck_in_its_data_is_named_by_all(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    ranks = spoil.run_spoilt_ranks(config, free_port(), 3, {1: spoil.stick_in_loader})
    run_dir = tmp_path / "run"
    expected = (
        rf"rank 1 on {HOST} has stood still for {SECONDS} s {TIME}, in 'read data' of step 2; the "
        "other ranks wait for it"
    )
    check_end(ranks, run_dir, expected)
    stacks = (run_dir / "log.rank-1.txt").read_text()
    assert " in load_step\n" in stacks and "stall_watch.py" in stacks
    assert "accumulate_gradients" in (run_dir / "log.rank-0.txt").read_text()
    assert (run_dir / "flight_recorder_2").stat().st_size > 0


def test_a_collective_that_blocks_in_c_ends(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    everyone = dict.fromkeys(range(2), spoil.block_in_collective)
    ranks = spoil.run_spoilt_ranks(config, free_port(), 2, everyone)
    names = f"rank 0 on {HOST}, rank 1 on {HOST}"
    expected = (
        rf"{names} have stood still for {SECONDS} s {TIME}, in 'forward and backward' of step 2: "
        "no rank gets on; they wait for each other in a collective"
    )
    check_end(ranks, tmp_path / "run", expected)


def test_a_frozen_first_rank_is_named_by_the_others(tmp_path: Path) -> None:
    """It serves the store: the others' calls to it never return."""
    config = make_config(tmp_path)
    ranks = spoil.run_spoilt_ranks(config, free_port(), 2, {0: spoil.freeze_in_loader}, survivors=1)
    expected = (
        rf"rank 0 on {HOST}, which connects the ranks, has given no sign of life for {SECONDS} s "
        # where it was when it sent its last beat: the second step may come before the next one
        rf"{TIME}, last in (?:'[^']+'|\"[^\"]+\")[^:]* (of step [12]|before the first step): "
        r"it is frozen or "
        r"dead, or the network to it is cut \(stacks: .*\)"
    )
    assert ranks[0].code is None
    for ended in ranks[1:]:
        assert ended.code == 1
        # three seconds after its last beat, which came up to one before it froze
        assert 2 <= ended.seconds < 3 + EXIT_SECONDS
        assert re.search(expected, ended.last_line), ended.text
        assert "Traceback" not in ended.text
    assert re.search(expected, read_last_line(tmp_path / "run"))
    state = read_run_state(tmp_path / "run")
    assert state is not None and state.state == "failed" and re.search(expected, state.reason)


def test_a_collective_that_times_out_before_names_the_frozen_first_rank(tmp_path: Path) -> None:
    """The search for the rank to blame ends, although the store does not answer."""
    config = make_config(tmp_path, stall_seconds=100, timeout_minutes=0.05)
    ranks = spoil.run_spoilt_ranks(config, free_port(), 2, {0: spoil.freeze_in_loader}, survivors=1)
    assert ranks[1].code == 1
    line = f"dist-peft: rank 1 on {HOST} lost its peers: no sign of life from rank 0 on {HOST} "
    assert ranks[1].last_line.startswith(line)


def test_long_phases_are_no_stall(tmp_path: Path) -> None:
    config = make_config(tmp_path, stall_seconds=1)
    ranks = spoil.run_spoilt_ranks(config, free_port(), 2, {1: spoil.evaluate_slowly})
    assert [ended.code for ended in ranks] == [0, 0], ranks


def test_one_process_watches_itself(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (ended,) = spoil.run_spoilt_ranks(config, free_port(), 1, {0: spoil.stick_in_loader})
    assert ended.code == 1
    assert 3 <= ended.seconds < 3 + EXIT_SECONDS
    expected = (
        rf"dist-peft: rank 0 on {HOST} has stood still for {SECONDS} s {TIME}, in 'read data' of"
    )
    assert re.match(expected, ended.last_line), ended.text


def test_a_rank_that_dies_before_the_ranks_are_connected_is_named(tmp_path: Path) -> None:
    """Not after the time limit of gloo, which looks for its address."""
    config = make_config(tmp_path, stall_seconds=100)
    spoilt = {0: spoil.find_dead_ranks_early, 1: spoil.die_before_the_group}
    ranks = spoil.run_spoilt_ranks(config, free_port(), 2, spoilt)
    assert [ended.code for ended in ranks] == [1, 9]
    line = f"dist-peft: rank 0 on {HOST} stops: rank 1 on {HOST} died during the phase 'connect"
    assert ranks[0].text.strip().startswith(line), ranks[0].text


@pytest.mark.parametrize("dead", [1, 0])
def test_a_rank_that_dies_while_others_connect_to_it_is_named(tmp_path: Path, dead: int) -> None:
    """At the first checkpoint its writers get a process group: gloo waits for the dead rank."""
    config = make_config(tmp_path, stall_seconds=300, start_timeout_minutes=1.5)
    text = config.read_text()
    assert "every: 0" in text
    config.write_text(text.replace("every: 0", "every: 1"))
    spoilt = dict.fromkeys(range(3), spoil.name_unconnected_ranks_early)
    ranks = spoil.run_spoilt_ranks(
        config, free_port(), 3, {**spoilt, dead: spoil.die_while_others_connect}
    )
    assert ranks[dead].code == -9
    for rank, ended in enumerate(ranks):
        if rank != dead:
            assert ended.code == 1 and f"rank {dead} on {HOST}" in ended.last_line, ended.text
            assert ended.last_line.startswith(f"dist-peft: rank {rank} on {HOST}")
    state = read_run_state(tmp_path / "run")
    assert state is not None and state.state == "failed"


def test_a_rank_out_of_memory_says_what_to_lower_and_the_others_say_it_too(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    ranks = spoil.run_spoilt_ranks(config, free_port(), 2, {1: spoil.run_out_of_memory})
    cause = "out of GPU memory in 'read data' of step 2 (Tried to allocate 2.50 GiB. GPU 0 has a"
    assert [ended.code for ended in ranks] == [1, 1]
    assert ranks[1].last_line.startswith(f"dist-peft: rank 1 on {HOST}: failed: {cause}")
    assert "lower data.seq_len (now 16) or adapter.r (now 4), set " in ranks[1].last_line
    line = f"dist-peft: rank 0 on {HOST} stops: rank 1 on {HOST} failed: {cause}"
    assert ranks[0].last_line.startswith(line)
    reason = json.loads((tmp_path / "run" / "run_state.json").read_text())["reason"]
    assert "data.seq_len (now 16)" in reason
