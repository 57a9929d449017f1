import pytest

from dist_peft.train.plot_axes import FONT_SIZE, SMALL_SIZE, WIDE_SIZE, add_legend, make_step_axes
from dist_peft.train.svg import drawing


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("runs", [1, 3, 15])
def test_legend_lies_between_title_and_axes(is_wide: bool, runs: int) -> None:
    with drawing():
        figure, axes = make_step_axes("Loss", "nats", is_wide)
        for number in range(runs):
            axes.plot([0, 9], [5, number], label=f"a run of some name, {number}")
        before = axes.get_position()
        add_legend(axes)
        legend = axes.get_legend()
        assert legend is not None and len(legend.get_texts()) == runs
        figure.canvas.draw()
        frame, box = axes.get_window_extent(), legend.get_window_extent()
        if (runs, is_wide) == (15, False):  # eight rows leave no plot: it lies inside
            assert axes.get_position().bounds == before.bounds
            return
        title = axes._left_title.get_window_extent()  # type: ignore[attr-defined]
        assert frame.y1 <= box.y0 < box.y1 <= title.y0 + 2
        assert title.y1 <= figure.bbox.y1
        assert axes.get_position().y0 == before.y0
        label = axes.xaxis.label.get_window_extent()
        assert label.y0 >= 0


def test_no_legend_without_labels() -> None:
    with drawing():
        _, axes = make_step_axes("Loss", "nats", False)
        before = axes.get_position().bounds
        axes.plot([0, 1], [1, 2])
        add_legend(axes)
        assert axes.get_legend() is None and axes.get_position().bounds == before
    assert SMALL_SIZE < WIDE_SIZE and FONT_SIZE == 10
