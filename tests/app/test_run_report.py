"""The report of a run has the norms of its adapter."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dist_peft.app.run_report import write_run_report
from dist_peft.train.run_summary import RunSummary


def test_norms_of_the_adapter_are_kept_for_later_drawings(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    save_file({"m.layers.3.x": torch.tensor([3.0, 4.0])}, tmp_path / "adapter" / "a.safetensors")
    page = write_run_report(tmp_path, RunSummary("base", "ia3", "nf4", "single", 1))
    stored = json.loads((tmp_path / "report.json").read_text())["summary"]
    assert stored["layer_norms"] == [["3", 5.0]]
    assert "norm of the trained tensors" in page.read_text()
