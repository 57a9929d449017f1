"""Plots: they draw for any length of run, on labelled axes, without global state."""

import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.colors import to_hex

from dist_peft.train.plot_axes import make_step_axes
from dist_peft.train.plots import (
    PLOTS,
    PlotSpec,
    draw_bars,
    draw_heat_maps,
    draw_overlay,
    draw_plot,
    list_eval_points,
    smooth_values,
)
from dist_peft.train.step_metrics import StepMetrics

BY_NAME = {plot.name: plot for plot in PLOTS}


def run(steps: int) -> list[StepMetrics]:
    return [
        StepMetrics(s, 3 / s + 1, 1e-4, 0.5 + s % 3, 1000, 250.0 + s, 2**30 + s, 0)
        for s in range(1, steps + 1)
    ]


def axes_of(plot: PlotSpec, records: Sequence[StepMetrics]):  # type: ignore[no-untyped-def]
    _, axes = make_step_axes(plot.title, plot.unit, plot.is_wide)
    plot.paint(axes, records)
    return axes


def full_run(steps: int) -> list[StepMetrics]:
    """A run with the numbers of every plot."""
    tasks = {"rte": 1.0, "_mrpc $x$": 2.0}
    return [
        replace(r, straggler_share=0.1, mem_reserved=2**31, eval_by_task=tasks) for r in run(steps)
    ]


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_every_plot_draws_text_and_colours_of_the_page(plot: PlotSpec) -> None:
    picture = draw_plot(plot, full_run(40))
    assert picture.startswith('<svg viewBox="0 0 331.2 216" role="img"')
    assert f">{plot.title}</text>" in picture and ">optimizer step</text>" in picture
    assert "var(--plot-ink)" in picture and "var(--plot-curve-" in picture
    assert picture == draw_plot(plot, full_run(40))  # the same bytes each time
    wide = draw_plot(plot, full_run(40), is_wide=True)
    assert 'viewBox="0 0 691.2 273.6"' in wide
    names = [set(re.findall(r' id="([^"]*)"', text)) for text in (picture, wide)]
    assert names[0] and not names[0] & names[1]


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_axes_say_what_they_show(plot: PlotSpec) -> None:
    axes = axes_of(plot, run(3))
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == plot.unit
    assert axes.get_title(loc="left") == plot.title


@pytest.mark.parametrize("rows", [1, 32])
def test_heat_maps_have_a_field_for_each_share(rows: int) -> None:
    """A dark field for little, a bright one for much, in each of two tables, in their order."""
    table = [[0.02, 0.98]] * rows
    names = [f"row {row}" for row in range(rows)]
    picture = draw_heat_maps("Shares", names, ["a", "b"], {"x": table, "y": table})
    little, much = (to_hex(colormaps["cividis"](share)) for share in (0.02, 0.98))
    fields = re.findall(r"fill: (#[0-9a-f]{6})", picture)
    kept = [colour for colour in fields if colour in (little, much)]
    assert kept[: 2 * rows] == [little, much] * rows
    assert picture.count(">0.98</text>") == picture.count(">0.02</text>") == 2 * rows
    assert all(f">{name}</text>" in picture for name in names)


def test_bars() -> None:
    values = {str(block): float(block) for block in range(30)}
    picture = draw_bars("Change", "norm", values, "norms")
    assert picture.count("var(--plot-curve-3)") == 30
    labels = [label for label in re.findall(r">(\d+)</text>", picture) if label in values]
    assert {"0", "3", "27"} <= set(labels)


def test_overlay_of_runs() -> None:
    """More runs than colours differ in the style of their lines; names are text."""
    first = [replace(r, eval_loss=1.0 if r.step == 20 else None) for r in run(20)]
    runs = {f"<b>$run_{n}": first for n in range(7)}
    picture = draw_overlay(runs)
    assert all(f"&lt;b&gt;$run_{n}" in picture for n in range(7))
    assert "stroke-dasharray" in picture
    assert "<b>" not in picture and ":root" not in picture
    alone = draw_overlay({"a": run(1)}, is_wide=True, is_file=True)
    assert "xmlns=" in alone and "prefers-color-scheme: dark" in alone


@pytest.mark.parametrize("name", ["loss", "tasks"])
def test_evaluations_are_points_without_a_line_between_them(name: str) -> None:
    records = [replace(r, eval_loss=2.0, eval_by_task={"a": 1.0, "b": 2.0}) for r in run(3)]
    axes = axes_of(BY_NAME[name], records)
    evaluations = [line for line in axes.lines if not str(line.get_label()).startswith("train")]
    assert len(evaluations) == (1 if name == "loss" else 2)
    for line in evaluations:
        assert line.get_linestyle() == "None" and line.get_marker() not in ("", "None")


def test_points_of_each_task() -> None:
    records = run(3)
    records[0] = replace(records[0], eval_by_task_before={"a": 4.0, "b": 5.0})
    records[2] = replace(records[2], eval_by_task={"a": 1.0, "b": 2.0})
    lines = axes_of(BY_NAME["tasks"], records).lines
    assert [line.get_label() for line in lines] == ["a", "b"]
    assert lines[1].get_xydata().tolist() == [[0, 5.0], [3, 2.0]]
    assert [plot.name for plot in PLOTS if not plot.is_shown(run(3))] == ["tasks", "stragglers"]
    assert all(plot.is_shown(full_run(1)) for plot in PLOTS)


def test_drawing_a_report_takes_less_than_a_second() -> None:
    """Of CPU time, for 500 steps and every plot, as ``benchmarks/fixed_costs.py`` measures it."""
    records = full_run(500)
    draw_plot(PLOTS[0], records)  # fonts are read once
    begin = time.process_time()
    for plot in PLOTS:
        draw_plot(plot, records, is_wide=plot.is_wide)
    assert time.process_time() - begin < 1.0


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(PLOTS)
    assert set(BY_NAME) == {
        *("loss", "tasks", "lr", "grad_norm", "tokens_per_s", "memory", "stragglers")
    }


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
    allocated, reserved = axes_of(BY_NAME["memory"], full_run(2)).lines
    assert allocated.get_label() == "allocated" and reserved.get_ydata()[0] == 2.0


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
    assert draw_plot(plot, records).startswith("<svg ")


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
    axes = axes_of(BY_NAME["loss"], records)
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert np.asarray(lines["spike"].get_xydata()).tolist() == [[20, 9.0]]
    assert np.asarray(lines["not finite, no update"].get_xdata()).tolist() == [10]
    average = np.asarray(lines["train, moving average"].get_ydata(), dtype=float)
    assert np.isfinite(average).all() and average[9] == average[8]
    assert draw_plot(BY_NAME["grad_norm"], records).startswith("<svg ")
