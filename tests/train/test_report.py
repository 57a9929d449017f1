"""The report: complete, self-contained, safe, and writable for the smallest run."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dist_peft.core.config.io import dump_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.train import report
from dist_peft.train.attention_record import FusionAttention
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.plots import PLOTS, draw_plot
from dist_peft.train.report import write_report, write_task_report
from dist_peft.train.report_page import ReportSection
from dist_peft.train.run_summary import RunSummary
from dist_peft.train.step_metrics import StepMetrics

SUMMARY = RunSummary("org/model", "lora (r 8)", "nf4", "fsdp2", 2, (("Trainable", "1,234"),))


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and only one test here looks at the images."""
    monkeypatch.setattr(report, "draw_plot", lambda plot, records, is_wide=False: "<svg></svg>")


class Page(HTMLParser):
    """Tags with attributes, and the table as label -> value."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], "unbalanced tags"
        self.table = dict(zip(self.cells[::2], self.cells[1::2], strict=True))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data


def record(step: int, loss: float) -> StepMetrics:
    return StepMetrics(
        step, loss, 1e-4, 0.5, 1000, 250.0 + step, 3 * 2**30, 5 * 2**20, seconds=60.0
    )


def write(run_dir: Path, *records: StepMetrics) -> None:
    with MetricsWriter(run_dir, rank=0) as metrics:
        for item in records:
            metrics.write_step(item)


def test_a_whole_run(tmp_path: Path) -> None:
    write(
        tmp_path,
        replace(record(1, 3.0), eval_loss_before=3.5),
        replace(record(2, 2.0), eval_loss=1.5),
        replace(record(3, 1.0), eval_loss=1.75),
    )
    (tmp_path / "config.yaml").write_text("base:\n  path: org/model\n")
    path = write_report(tmp_path, SUMMARY)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.table == {
        "Base model": "org/model",
        "Base storage": "nf4",
        "Adapter": "lora (r 8)",
        "Engine": "fsdp2",
        "Ranks": "2",
        "Trainable": "1,234",
        "Steps": "3",
        "Target tokens": "3,000",
        "Time in steps": "0:03:00",
        "Training loss, first step": "3.0000",
        "Training loss, last step": "1.0000",
        "Held-out loss at step 0": "3.5000",
        "Held-out loss at step 3": "1.7500",
        "Best held-out loss": "1.5000 at step 2",
        "Throughput (median)": "252 targets/s",
        "Throughput of a rank (median)": "126 targets/s",
        "Peak memory (fullest rank)": "3.00 GiB",
        "Gathered per step and rank": "5.00 MiB",
    }
    assert "Held-out loss 3.5000 at step 0, 1.7500 at step 3." in page.source
    assert "path: org/model" in page.source


def test_images_are_inline_in_both_themes_and_nothing_else_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_plot", draw_plot)
    write(tmp_path, record(1, 2.0), record(2, 1.0))
    path = write_report(tmp_path, SUMMARY)
    page = Page(path)
    pictures = [dict(attributes) for tag, attributes in page.tags if tag == "svg"]
    always = [plot for plot in PLOTS if plot.name not in ("tasks", "stragglers")]
    assert len(pictures) == len(always) + 1  # the loss is drawn for wide screens, too
    assert all(picture["aria-label"] for picture in pictures)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page.source))
    assert {name for pair in used for name in pair if name} <= set(identifiers)
    themes = re.findall(r"--plot-([a-z0-9-]+):", page.source)
    assert set(re.findall(r"var\(--plot-([a-z0-9-]+)\)", page.source)) <= set(themes)
    assert themes.count("ink") == 2  # light and dark
    assert not {t for t, _ in page.tags} & {"script", "link", "iframe", "a", "img", "image"}
    assert not re.search(r"https?:|@import|url\((?!#)", page.source)


@pytest.mark.parametrize(
    ("records", "headline"),
    [
        ((), "No step has been recorded."),
        ((record(1, 2.0),), "Training loss 2.0000 after 1 step."),
        ((record(1, 2.0), record(2, 1.0)), "Training loss 2.0000 at first, 1.0000 after 2 steps."),
        (
            (replace(record(1, 2.0), eval_loss=1.5),),
            "Training loss 2.0000 after 1 step.",
        ),
    ],
)
def test_small_runs(tmp_path: Path, records: tuple[StepMetrics, ...], headline: str) -> None:
    write(tmp_path, *records)
    page = Page(write_report(tmp_path, SUMMARY))
    assert headline in page.source
    assert page.table["Steps"] == str(len(records))
    assert ("svg" in {t for t, _ in page.tags}) == bool(records)
    assert "Resolved configuration" not in page.source


def test_a_run_that_recorded_nothing_at_all(tmp_path: Path) -> None:
    assert "No step" in write_report(tmp_path, SUMMARY).read_text()


def test_records_without_seconds_still_give_a_time(tmp_path: Path) -> None:
    write(tmp_path, replace(record(1, 2.0), seconds=None, tokens=500, tokens_per_s=100.0))
    assert Page(write_report(tmp_path, SUMMARY)).table["Time in steps"] == "0:00:05"


def test_whatever_a_model_says_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>\n& more"
    section = ReportSection("Sam<ples", rows=(("a<b", evil),), texts=(("Pro<mpt", evil),))
    (tmp_path / "config.yaml").write_text(evil)
    page = Page(write_report(tmp_path, replace(SUMMARY, model=evil), [section]))
    assert "script" not in {t for t, _ in page.tags}
    assert page.table["Base model"] == page.table["a<b"] == evil
    assert "<pre>&lt;script&gt;" in page.source


def test_sections_are_optional_parts(tmp_path: Path) -> None:
    sections = [
        ReportSection("Merge", rows=(("Largest difference", "0"),)),
        ReportSection("Samples", texts=(("before", "x"), ("after", "y"))),
    ]
    source = write_report(tmp_path, SUMMARY, sections).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", source) == ["Setup", "Outcome", "Merge", "Samples"]
    assert re.findall(r"<h3>(.*?)</h3>", source) == ["before", "after"]


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("x\n{}\n")
    with pytest.raises(UserError, match="line 1"):
        write_report(tmp_path, SUMMARY)


def test_the_resolved_configuration_is_shown_as_written(tmp_path: Path) -> None:
    config = parse_config({"base": {"path": "dir"}, "data": {"train": ["a.jsonl"]}})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    page = write_report(
        tmp_path, RunSummary.from_config(config, engine="single", ranks=1)
    ).read_text()
    assert "micro_batch: 1" in page


def test_of_several_tasks(tmp_path: Path) -> None:
    """One table a task; names are as safe as everything else."""
    last = replace(record(2, 2.0), eval_loss=1.5)
    tasks = {"<b>rte": [replace(record(1, 3.0), eval_loss_before=3.5), last], "mrpc": [last]}
    page = Page(write_task_report(tmp_path, SUMMARY, tasks))
    assert "An adapter for each of 2 tasks" in page.source and "<h2>mrpc</h2>" in page.source
    assert "&lt;b&gt;rte" in page.source and "<b>" not in page.source
    assert page.cells.count("Held-out loss at step 2") == 2
    assert page.table["Adapter"] == "lora (r 8)"
    assert page.table["Held-out loss at step 0"] == "3.5000"


def test_attention_of_a_fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for each task, or one where there are none; no table without the file."""
    write(tmp_path, record(1, 2.0))
    drawn: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        report, "draw_heat_maps", lambda *args: drawn.append(args) or "<svg>attention</svg>"
    )
    write_report(tmp_path, SUMMARY)
    assert not drawn
    one = FusionAttention(["a", "b"], ["l.3.output_adapters"], "tokens", 3, [[0.5, 0.5]], {})
    several = replace(one, by_task={"x": [[0.1, 0.9]], "y": [[0.9, 0.1]]})
    for found, panels in ((one, {"held-out rows": [[0.5, 0.5]]}), (several, several.by_task)):
        found.write_json(tmp_path)
        drawn.clear()
        page = Page(write_report(tmp_path, SUMMARY))
        ((title, *args),) = drawn
        assert title == "Attention to the fused adapters, by layer"
        assert args == [["3"], ["a", "b"], panels]
        assert "<svg>attention" in page.source


def test_spikes_and_failed_steps_are_counted(tmp_path: Path) -> None:
    steps = [replace(record(1, 2.0)), replace(record(2, 9.0), spike=8.0)]
    steps += [replace(record(n, math.nan), grad_norm=math.nan) for n in range(3, 13)]
    with MetricsWriter(tmp_path, 0) as metrics:
        for step in steps:
            metrics.write_step(step)
    table = Page(write_report(tmp_path, SUMMARY)).table
    assert table["Loss spikes"] == "1 (step 2)"
    shown = "3, 4, 5, 6, 7, 8, 9, 10, ..."
    assert table["Steps not finite, without update"] == f"10 (steps {shown})"


def test_ranks_stragglers_and_reserved_memory(tmp_path: Path) -> None:
    steps = [
        replace(record(n, 2.0), straggler_share=n / 10, mem_reserved=n * 2**30) for n in (1, 2, 3)
    ]
    write(tmp_path, *steps)
    summary = replace(
        SUMMARY, data=(("Longest document", "9 tokens"),), environment=(("GPU", "x"),)
    )
    table = Page(write_report(tmp_path, summary)).table
    assert table["Throughput of a rank (median)"] == "126 targets/s"
    assert table["Straggler share (median)"] == "20.0%"
    assert table["Reserved by the allocator"] == "3.00 GiB"
    assert table["Longest document"] == "9 tokens" and table["GPU"] == "x"
    rates = {"rank_rate_min": 90.0, "rank_rate_median": 100.0, "rank_rate_max": 110.0}
    busy = [
        replace(s, **rates, slowest_rank=rank) for s, rank in zip(steps, (3, 0, 3), strict=True)
    ]
    write(tmp_path / "rates", *busy)
    table = Page(write_report(tmp_path / "rates", summary)).table
    shown = table["Throughput by rank, min / median / max"]
    assert shown == "90 / 100 / 110 targets/s" and table["Slowest rank"] == "3, in 67% of the steps"
    assert "Throughput of a rank (median)" not in table
    write(tmp_path / "one", record(1, 2.0))
    alone = Page(write_report(tmp_path / "one", replace(SUMMARY, ranks=1))).table
    assert not {"Throughput of a rank (median)", "Straggler share (median)"} & alone.keys()


def test_norms_of_blocks_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_bars", lambda *args: f"<svg>{args}</svg>")
    norms = (("0", 1.5), ("1", 2.5))
    path = write_report(tmp_path, replace(SUMMARY, layer_norms=norms, norm_meaning="norm of it"))
    assert "norm of it" in path.read_text() and "{'0': 1.5, '1': 2.5}" in path.read_text()
