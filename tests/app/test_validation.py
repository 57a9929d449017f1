"""Checks of a base with weights: header, targets, unused options; warnings are collected."""

import logging
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.validation import validate_run
from dist_peft.app.validation_report import ValidationReport
from dist_peft.core.config.io import parse_config
from dist_peft.plan.cluster import Cluster
from tests.support.tiny_runs import tiny_tree

CARD = Cluster(1, 1, 1 << 30)


def validate(tree: dict[str, Any]) -> ValidationReport:
    return validate_run(parse_config(tree), CARD, 0, has_limit=False, plans=False)


def test_base_with_weights(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, base__quant={"kind": "int", "group_size": 256}, data__eval=[])
    logger = logging.getLogger("dist_peft")
    before = list(logger.handlers)
    report = validate(tree | {"engine": {"stage": 2}})
    assert logger.handlers == before
    assert not report.problems and report.rows == [] and report.memory is None
    assert report.model is not None and report.run is not None
    assert report.model.positions == 64 and report.model.packed_share > 0
    assert report.run.sequences == 8 and report.run.steps == 3 and report.run.held_out == 0
    assert any("engine.stage 2 has no effect" in text for text in report.warnings)
    assert any("group_size 256 is more than the largest" in text for text in report.warnings)
    assert not (tmp_path / "run").exists()


def test_damaged_header_does_not_hide_the_data(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    report = validate(tree)
    assert len(report.problems) == 1 and "model.safetensors" in report.problems[0]
    assert report.model is None and len(report.sources) == 2 and report.run is not None
    tree["base"]["path"] = str(tmp_path / "nowhere")
    report = validate(tree)
    assert len(report.problems) == 1 and not report.sources


def test_split_and_its_limits(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, data__val_split=0.25, data__eval=[])
    report = validate(tree)
    assert not report.problems and report.run is not None and report.run.held_out == 2
    tree["data"]["val_split"] = 8
    assert "would hold out 8 of the 8 records" in validate(tree).problems[0]
    tree["data"]["val_split"] = 0
    tree["train"]["global_batch"] = 2
    tree["data"]["seq_len"] = 8
    (tmp_path / "train.jsonl").write_text('{"prompt": "w5 ", "completion": "w6"}\n')
    assert validate(tree).run is not None


@pytest.mark.parametrize("template", ["{{", "{% if %}"])
def test_bad_template_is_a_problem(tmp_path: Path, template: str) -> None:
    report = validate(tiny_tree(tmp_path, data__chat_template=template))
    assert len(report.problems) == 1 and "data.chat_template is not valid" in report.problems[0]
    assert report.model is None or report.model.kind == "llama"
