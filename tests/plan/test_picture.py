from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.plan.memory import MemoryItem, MemoryPlan
from dist_peft.plan.picture import draw_memory_bar, list_bar_parts

ITEMS = (
    MemoryItem("packed base", 15 * 2**30, "rest"),
    MemoryItem("buffers", 2**20, "rest"),
    MemoryItem("activations", 3 * 2**30, "step"),
    MemoryItem("NCCL", 2**29, "assumed"),
)
PLAN = MemoryPlan(ITEMS, (), "backward", 24 * 2**30)


def test_parts_add_up_and_small_ones_are_one() -> None:
    parts = list_bar_parts(PLAN)
    assert [name for name, _, _ in parts] == [
        "packed base",
        "other (rest)",
        "activations",
        "NCCL",
    ]
    assert sum(size for _, size, _ in parts) == pytest.approx(PLAN.total / 2**30)
    assert len({colour for _, _, colour in parts}) == len(parts)


def test_files(tmp_path: Path) -> None:
    for ending, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = tmp_path / f"plan{ending}"
        draw_memory_bar(PLAN, "a run", path)
        assert path.read_bytes().startswith(start)
    svg = (tmp_path / "plan.svg").read_text()
    assert "packed base, 15.00 GiB" in svg and "card, 24.0 GiB" in svg
    draw_memory_bar(PLAN, "a run", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg
    with pytest.raises(UserError, match=r"as \.svg or \.png"):
        draw_memory_bar(PLAN, "a run", tmp_path / "plan.pdf")
    with pytest.raises(UserError, match="cannot be written"):
        draw_memory_bar(PLAN, "a run", tmp_path / "absent" / "plan.svg")
