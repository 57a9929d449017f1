"""Run directories as training leaves them, for comparisons."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.run_summary import RunSummary
from dist_peft.train.step_metrics import StepMetrics


def make_run(run_dir: Path, r: int, loss: float, *, is_finished: bool = True) -> Path:
    """A run of three steps with two evaluations; ``loss``: the last held-out one."""
    run_dir.mkdir(parents=True)
    steps = [
        StepMetrics(n, 3.0 / n, 1e-4, 0.5, 100, 50.0 * n, 2**30, 0, seconds=2.0) for n in (1, 2, 3)
    ]
    steps[0] = replace(steps[0], eval_loss_before=4.0)
    steps[2] = replace(steps[2], eval_loss=loss, straggler_share=0.25)
    with MetricsWriter(run_dir, rank=0) as metrics:
        for step in steps:
            metrics.write_step(step)
    tree: dict[str, Any] = {"adapter": {"r": r, "use_dora": r > 8}, "save": {"dir": str(run_dir)}}
    tree |= {"data": {"eval": [{"path": "held_out.jsonl"}]}}
    (run_dir / "config.yaml").write_text(json.dumps(tree))
    if is_finished:
        environment = (("Hardware", f"card {r}"), ("Command", f"x {r}"))
        summary = RunSummary("b", "lora", "nf4", "fsdp2", 2, environment=environment)
        (run_dir / "report.json").write_text(
            json.dumps({"summary": asdict(summary), "sections": []})
        )
    return run_dir
