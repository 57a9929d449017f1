"""The report as JSON, and the rows that it shows of both sides of a split."""

import json
from pathlib import Path

from dist_peft.app.validation_report import MemoryReport, ValidationReport
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl


def test_rows_of_both_sides(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "completion": "c"} for i in range(6)]
    file = str(write_jsonl(tmp_path / "a.jsonl", records))
    config = data_config(tmp_path / "cache", train=[file], val_split=2, packing=False)
    report = ValidationReport()
    report.render_rows(config, byte_tokenizer(), 3)
    assert [(row.key, row.index) for row in report.rows] == [
        ("data.train[0]", 0),
        ("data.train[0]", 1),
        ("data.train[0]", 2),
        ("data.eval[0]", 0),
        ("data.eval[0]", 1),
    ]
    texts = {"".join(part.text for part in row.parts) for row in report.rows}
    assert len(texts) == 5 and all(row.parts[-1].text == "c</s>" for row in report.rows)
    tree = json.loads(json.dumps(report.to_json()))
    assert tree["rows"][0]["parts"][1] == {"text": "c</s>", "in_loss": True, "begins": False}


def test_problems_once_and_memory() -> None:
    report = ValidationReport()
    report.add_problem("a")
    report.add_problem("a")
    assert report.problems == ["a"]
    for limit, fits in ((None, None), (5, True), (4, False)):
        report.memory = MemoryReport(1, 1, "single", 5, limit, {"a": 5})
        assert report.to_json()["memory"]["fits"] is fits
