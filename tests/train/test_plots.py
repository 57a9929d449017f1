"""Plots: they draw for any length of run, on labelled axes, without global state."""

import io
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread

from dist_peft.train.plots import (
    _PALETTES,
    PLOTS,
    PlotSpec,
    Theme,
    _prepare_axes,
    draw_heat_maps,
    draw_plot,
    draw_plot_in_themes,
    list_eval_points,
    smooth_values,
)
from dist_peft.train.step_metrics import StepMetrics

FIELDS = [colormaps["cividis"](share)[:3] for share in (0.02, 0.98)]
BY_NAME = {plot.name: plot for plot in PLOTS}


def run(steps: int) -> list[StepMetrics]:
    return [
        StepMetrics(s, 3 / s + 1, 1e-4, 0.5 + s % 3, 1000, 250.0 + s, 2**30 + s, 0)
        for s in range(1, steps + 1)
    ]


def axes_of(plot: PlotSpec, records: Sequence[StepMetrics]):  # type: ignore[no-untyped-def]
    axes = Figure().add_subplot()
    _prepare_axes(axes, plot, _PALETTES["light"])
    plot.paint(axes, records, _PALETTES["light"])
    return axes


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_every_plot_draws_in_both_themes(plot: PlotSpec) -> None:
    both = draw_plot_in_themes(plot, run(40))
    images = [imread(io.BytesIO(image)) for image in both.values()]
    # the second is drawn as if the figure had been made in its colours
    direct = imread(io.BytesIO(draw_plot(plot, run(40), "dark")))
    assert (np.abs(images[1] - direct).max(-1) > 0).mean() < 0.01
    for image in images:
        assert image.shape[1] == round(plot.size[0] * 144)
        colours = np.unique(image[::4, ::4].reshape(-1, image.shape[-1]), axis=0)
        assert len(colours) > 10  # not a blank page
    assert images[0][0, 0, :3].mean() > 0.9
    assert images[1][0, 0, :3].mean() < 0.2


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_axes_say_what_they_show(plot: PlotSpec) -> None:
    axes = axes_of(plot, run(3))
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == plot.unit
    assert axes.get_title(loc="left") == plot.title


@pytest.mark.parametrize("rows", [1, 32])
def test_heat_maps_draw_in_both_themes(rows: int) -> None:
    """A dark field for little, a bright one for much, in each of two tables."""
    table = [[0.02, 0.98]] * rows
    names = [str(row) for row in range(rows)]
    themes: tuple[tuple[Theme, float], ...] = (("light", 1.0), ("dark", 0.12))
    for theme, paper in themes:
        data = draw_heat_maps("Shares", names, ["a", "b"], {"x": table, "y": table}, theme)
        image = imread(io.BytesIO(data))[:, :, :3]
        assert abs(image[0, 0].mean() - paper) < 0.1
        little, much = (np.abs(image - colour).max(-1) < 0.02 for colour in FIELDS)
        assert little.sum() > 500 and much.sum() > 500


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(PLOTS)
    assert set(BY_NAME) == {"loss", "lr", "grad_norm", "tokens_per_s", "memory"}


def test_loss_shows_steps_average_and_held_out_points() -> None:
    records = run(40)
    records[0] = replace(records[0], eval_loss_before=4.0)
    records[-1] = replace(records[-1], eval_loss=1.2)
    raw, average, held_out = axes_of(BY_NAME["loss"], records).lines
    assert list(raw.get_ydata()) == [r.loss for r in records]
    assert len(average.get_ydata()) == 40
    assert list(zip(*held_out.get_data(), strict=True)) == [(0, 4.0), (40, 1.2)]


def test_a_short_run_is_not_smoothed_and_its_points_are_marked() -> None:
    (line,) = axes_of(BY_NAME["loss"], run(1)).lines
    assert line.get_marker() == "o"


def test_memory_is_in_gib() -> None:
    (line,) = axes_of(BY_NAME["memory"], run(2)).lines
    assert line.get_ydata()[0] == pytest.approx(1.0)


def test_one_outburst_of_the_gradient_makes_the_axis_logarithmic() -> None:
    records = run(30)
    assert axes_of(BY_NAME["grad_norm"], records).get_yscale() == "linear"
    records[10] = replace(records[10], grad_norm=500.0)
    assert axes_of(BY_NAME["grad_norm"], records).get_yscale() == "log"


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
@pytest.mark.parametrize(("value", "steps"), [(0.0, 1), (math.nan, 12)])
def test_zeros_gaps_and_single_steps_draw(plot: PlotSpec, value: float, steps: int) -> None:
    records = [
        replace(r, loss=value, lr=value, grad_norm=value, tokens_per_s=value, mem_peak=0)
        for r in run(steps)
    ]
    assert draw_plot(plot, records).startswith(b"\x89PNG")


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="plot loss: no records"):
        draw_plot(BY_NAME["loss"], [])


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(1, 50))
def test_smooth_is_the_weighted_mean_of_its_formula(values: list[float], span: float) -> None:
    a = 1 - 2 / (span + 1)
    weights = [a ** (len(values) - 1 - i) for i in range(len(values))]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    result = smooth_values(values, span)
    assert len(result) == len(values)
    assert result[0] == values[0]
    assert result[-1] == pytest.approx(mean, abs=1e-9)
    assert min(values) - 1e-9 <= result[-1] <= max(values) + 1e-9


def test_eval_points_in_order() -> None:
    first, second = run(2)
    records = [replace(first, eval_loss_before=3.0, eval_loss=2.0), replace(second, eval_loss=1.0)]
    assert list_eval_points(records) == [(0, 3.0), (1, 2.0), (2, 1.0)]


@pytest.mark.e2e
def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys; from dist_peft.train.plots import *; "
        "from dist_peft.train.step_metrics import *;"
        "draw_plot(PLOTS[0], [StepMetrics(1, 1.0, 1.0, 1.0, 1, 1.0, 1, 0)]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_marks_of_spikes_and_failed_steps() -> None:
    """A step without numbers leaves a gap and no other trace in the curves."""
    records = run(30)
    records[9] = replace(records[9], loss=math.nan, grad_norm=math.nan, nonfinite_steps=1)
    records[19] = replace(records[19], loss=9.0, spike=12.5)
    figure = Figure()
    axes = figure.add_subplot()
    BY_NAME["loss"].paint(axes, records, _PALETTES["light"])
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert np.asarray(lines["spike"].get_xydata()).tolist() == [[20, 9.0]]
    assert np.asarray(lines["not finite, no update"].get_xdata()).tolist() == [10]
    average = np.asarray(lines["train, moving average"].get_ydata(), dtype=float)
    assert np.isfinite(average).all() and average[9] == average[8]
    assert draw_plot(BY_NAME["grad_norm"], records).startswith(b"\x89PNG")
