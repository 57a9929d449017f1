"""Checkpoints: written at one number of ranks, read at another, never half, never damaged."""

import logging
import mmap
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_verify import find_checkpoint_damage
from tests.support.checkpoints import (
    NAMES,
    ROWS,
    make_position,
    make_sharded_state,
    make_whole_state,
    shard_state,
)
from tests.support.dist import run_ranks
from tests.support.small_disk import BALLAST, fill_disk


def save_one(world: World, directory: Path, step: int) -> Path:
    return CheckpointManager(directory, 2, world).save_checkpoint(
        make_sharded_state(world, step), make_position(step)
    )


def load_one(world: World, directory: Path) -> dict[str, Tensor]:
    checkpoints = CheckpointManager(directory, 2, world)
    path = checkpoints.select_checkpoint("auto")
    assert path is not None
    state = shard_state(world, {name: torch.zeros(ROWS, 5) for name in NAMES})
    checkpoints.load_checkpoint(path, state)
    for name, tensor in checkpoints.read_whole_tensors(path, ["start/b", "param/a"]).items():
        state[f"whole/{name}"] = tensor
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


def flip_bit(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    file.write_bytes(data)


def single(directory: Path, keep: int = 2) -> CheckpointManager:
    return CheckpointManager(directory, keep, World())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def check(state: dict[str, Tensor], step: int) -> None:
    for name, tensor in make_whole_state(step).items():
        assert torch.equal(state[name], tensor), name
    for name in ("start/b", "param/a"):
        assert torch.equal(state[f"whole/{name}"], make_whole_state(step)[name])


def test_saved_and_loaded_by_one_process(tmp_path: Path) -> None:
    path = save_one(World(), tmp_path, 3)
    assert path == tmp_path / "step-000003"
    assert CheckpointManager.read_position(path) == make_position(3)
    check(load_one(World(), tmp_path), 3)


def at_two_ranks(world: World, directory: Path) -> tuple[list[dict[str, Tensor]], str]:
    """Save at two ranks; load that, and what one process saved; then lose half of a file."""
    save_one(world, directory / "two", 5)
    states = [load_one(world, directory / "two"), load_one(world, directory / "one")]
    if world.is_first:
        shutil.copytree(directory / "two", directory / "damaged")
        file = directory / "damaged" / "step-000005" / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[:50])
    world.barrier()
    with pytest.raises(UserError) as caught:
        load_one(world, directory / "damaged")
    return states, str(caught.value)


@pytest.mark.dist
def test_any_number_of_ranks_reads_what_another_wrote(tmp_path: Path) -> None:
    save_one(World(), tmp_path / "one", 5)
    for states, text in run_ranks(at_two_ranks, 2, tmp_path):
        for state in states:
            check(state, 5)
        # only one rank's file is damaged, both say so
        assert text.startswith(
            f"every checkpoint in {tmp_path / 'damaged'} is damaged (step-000005: "
        )
        assert "__1_0.distcp has 50 bytes, not" in text
    assert names(tmp_path / "two") == ["step-000005"]
    for ranks in (1, 3):
        for state in run_ranks(load_one, ranks, tmp_path / "two"):
            check(state, 5)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_one(World(), tmp_path, step)
    assert names(tmp_path) == ["step-000002", "step-000010"]


def test_later_steps_of_an_earlier_run_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Started again below them, a run must not go on from them after its next stop."""
    save_one(World(), tmp_path, 6)
    late = save_one(World(), tmp_path, 8)
    with caplog.at_level(logging.WARNING, "dist_peft"):
        mine = save_one(World(), tmp_path, 2)
    assert names(tmp_path) == ["step-000002", "superseded"]
    assert names(tmp_path / "superseded") == ["step-000006", "step-000008"]
    assert f"{late} is of an earlier run: moved to" in caplog.text
    assert single(tmp_path).select_checkpoint("auto") == mine
    check(load_one(World(), tmp_path), 2)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save_one(World(), tmp_path, 999_999)
    newest = save_one(World(), tmp_path, 1_000_000)
    assert single(tmp_path).select_checkpoint("auto") == newest


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_one(World(), tmp_path, 3)
    single(tmp_path).save_checkpoint(make_whole_state(9), make_position(3))
    assert names(tmp_path) == ["step-000003"]
    read = single(tmp_path).read_whole_tensors(tmp_path / "step-000003", NAMES)
    assert torch.equal(read["param/a"], make_whole_state(9)["param/a"])


def test_half_written_and_incomplete_ones_are_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = save_one(World(), tmp_path, 3)
    partial, without = tmp_path / ".partial-step-000005", tmp_path / "step-000004"
    shutil.copytree(good, partial)
    shutil.copytree(good, without)
    (without / "run.json").unlink()
    with caplog.at_level(logging.WARNING, "dist_peft"):
        assert single(tmp_path).list_published() == [good, without]
        assert single(tmp_path).select_checkpoint("auto") == good
    assert f"skipping incomplete checkpoint {partial}" in caplog.text
    assert f"passing over damaged checkpoint {without}: run.json" in caplog.text
    shutil.rmtree(good)  # the only one is never silently started over
    with pytest.raises(UserError, match=r"every checkpoint .* damaged \(step-000004: run\.json"):
        single(tmp_path).select_checkpoint("auto")
    (tmp_path / "step-000007").touch()
    with pytest.raises(UserError, match=r"step-000007: it is no directory; step-000004"):
        single(tmp_path).find_checkpoint("last")
    (tmp_path / "step-000007").unlink()
    save_one(World(), tmp_path, 5)  # the leftover does not stop the next attempt
    assert not partial.exists()


def test_choose(tmp_path: Path) -> None:
    checkpoints = single(tmp_path)
    assert checkpoints.select_checkpoint("auto") is None
    first, second = save_one(World(), tmp_path, 1), save_one(World(), tmp_path, 2)
    assert checkpoints.select_checkpoint("auto") == second
    assert checkpoints.select_checkpoint("never") is None
    assert checkpoints.select_checkpoint(str(first)) == first
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoints.select_checkpoint(str(tmp_path))


def _damage(path: Path, kind: str) -> None:
    file = next(path.glob("*.distcp"))
    if kind == "absent":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "no metadata":
        (path / ".metadata").unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif kind == "overwritten":
        file.write_bytes(b"\xff" * file.stat().st_size)
    else:
        (path / ".metadata").write_bytes(b"not a pickle")


@pytest.mark.parametrize(
    "kind", ["absent", "empty", "truncated", "overwritten", "metadata", "no metadata"]
)
def test_damaged_files_are_refused(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_one(World(), tmp_path, 1)
    _damage(path, kind)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=rf"cannot read checkpoint {path}: .+; if files are damaged"),
    ):
        single(tmp_path).load_checkpoint(path, make_whole_state(2))
    assert "metadata is not found" not in caplog.text  # torch's tracebacks
    with pytest.raises(UserError, match=f"cannot read checkpoint {path}"):
        single(tmp_path).read_whole_tensors(path, ["param/a"])


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = save_one(World(), tmp_path, 1)
    with pytest.raises(UserError, match=r"cannot read checkpoint .*param/other"):
        single(tmp_path).load_checkpoint(path, {"param/other": torch.zeros(3)})
    with pytest.raises(UserError, match="param/a"):
        single(tmp_path).load_checkpoint(path, {"param/a": torch.zeros(ROWS + 1, 5)})
    with pytest.raises(UserError, match="lacks start/c"):
        single(tmp_path).read_whole_tensors(path, ["start/b", "start/c"])


def test_full_disk_leaves_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_one(World(), tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(UserError, match=r"step-000002 needs .* MiB but the disk has"):
            single(tmp_path, keep=1).save_checkpoint(make_whole_state(2), make_position(2))
    assert single(tmp_path).select_checkpoint("auto") == old
    check(load_one(World(), tmp_path), 1)


def test_disk_that_fills_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_one(World(), tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"cannot write checkpoint .*step-000002.*No space"):
            single(tmp_path, keep=1).save_checkpoint(make_whole_state(2), make_position(2))
    assert names(tmp_path) == ["step-000001"]  # what was half written takes no space
    assert single(tmp_path).select_checkpoint("auto") == old
    check(load_one(World(), tmp_path), 1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_at_any_write(small_disk: Path, asynchronous: bool) -> None:
    """With one page more each time, until the checkpoint fits."""
    old = save_one(World(), small_disk, 1)

    def save_on_full_disk(pages: int) -> str:
        fill_disk(small_disk, pages * mmap.PAGESIZE)
        checkpoints = CheckpointManager(small_disk, 2, World(), asynchronous=asynchronous)
        try:
            with checkpoints.writes_finished():
                checkpoints.save_checkpoint(make_whole_state(2), make_position(2))
        except UserError as error:
            assert single(small_disk).select_checkpoint("auto") == old
            return f"{error}; left {names(small_disk)[1:]}"
        finally:
            (small_disk / BALLAST).unlink()
        return ""

    errors = list(iter(map(save_on_full_disk, range(64)).__next__, ""))
    assert len(errors) >= 2
    for text in errors:
        assert "step-000002" in text and text.endswith("; left ['step-000001']"), text
    assert names(small_disk) == ["step-000001", "step-000002"]
    check(load_one(World(), small_disk), 2)


def test_a_damaged_newest_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = save_one(World(), tmp_path, 1), save_one(World(), tmp_path, 2)
    flip_bit(new / "__0_0.distcp", 1000)
    with caplog.at_level(logging.WARNING, "dist_peft"):
        assert single(tmp_path).select_checkpoint("auto") == old
    assert f"passing over damaged checkpoint {new}: the checksum of __0_0.distcp" in caplog.text
    with pytest.raises(UserError, match=rf"resume: checkpoint {new} is damaged: the checksum of"):
        single(tmp_path).select_checkpoint(str(new))
    check(load_one(World(), tmp_path), 1)
    mine = single(tmp_path).save_checkpoint(make_whole_state(2), make_position(2))  # trained again
    assert single(tmp_path).select_checkpoint("auto") == mine
    flip_bit(old / "run.json", 10)
    flip_bit(mine / "files.json", 30)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(step-000002: .*01: "):
        single(tmp_path).select_checkpoint("auto")
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_named_checkpoints(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, 1, World(), keep_best=True)
    for step, loss in enumerate((3.0, 2.0, 2.5, 2.7), 1):
        best = ("loss", loss) if loss in (3.0, 2.0) else None
        checkpoints.save_checkpoint(make_whole_state(step), make_position(step), best=best)
    assert names(tmp_path) == ["best.json", "step-000002", "step-000004"]
    found = [checkpoints.find_checkpoint(which).name for which in ("best", "last", "4", "2")]
    assert found == ["step-000002", "step-000004", "step-000004", "step-000002"]
    with pytest.raises(UserError, match="there are steps 2, 4"):
        checkpoints.find_checkpoint("3")
    (tmp_path / "best.json").unlink()
    with pytest.raises(UserError, match=r"save\.keep_best"):
        checkpoints.find_checkpoint("best")


def test_unfinished_ones_are_removed(tmp_path: Path) -> None:
    first = save_one(World(), tmp_path, 1)
    shutil.copytree(first, tmp_path / ".partial-step-000002")
    first.rename(tmp_path / ".replaced-step-000001")  # killed while it was saved again
    single(tmp_path).remove_unfinished()
    assert names(tmp_path) == ["step-000001"]
    check(load_one(World(), tmp_path), 1)


def test_asynchronous_writing_saves_the_values_of_its_step(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, 2, World(), asynchronous=True)
    state = make_whole_state(1)
    checkpoints.save_checkpoint(state, make_position(1))
    for tensor in state.values():
        tensor.zero_()  # the next step
    state = make_whole_state(2)
    with checkpoints.writes_finished():
        checkpoints.save_checkpoint(state, make_position(2))
    for step in (1, 2):
        read = checkpoints.read_whole_tensors(tmp_path / f"step-{step:06d}", NAMES)
        assert all(torch.equal(read[name], make_whole_state(step)[name]) for name in NAMES)
    assert find_checkpoint_damage(tmp_path / "step-000002", World()) is None


def test_errors_of_the_writer_thread_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_one(World(), tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_checkpoint", "finish_writing"):
        checkpoints = CheckpointManager(tmp_path, 1, World(), asynchronous=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            checkpoints.save_checkpoint(make_whole_state(2), make_position(2))
            while not checkpoints.has_failed:
                time.sleep(0.01)
        arguments = (make_whole_state(3), make_position(3)) if name == "save_checkpoint" else ()
        with pytest.raises(UserError, match=r"cannot write checkpoint .*step-000002.*No space"):
            getattr(checkpoints, name)(*arguments)
        assert names(tmp_path) == ["step-000001"]
    assert single(tmp_path).select_checkpoint("auto") == old


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create checkpoint directory"):
        single(tmp_path / "file").save_checkpoint(make_whole_state(1), make_position(1))
