import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_peft.app.adapter_job import AdapterJob, end_training
from dist_peft.app.model_setup import build_model
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import RESUMABLE
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


def test_job_knows_its_data_and_its_checkpoint(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path))
    setup = build_model(resolve_config(config))
    job = AdapterJob.check_inputs(config, setup, World(), "auto")
    assert job.resume_from is None and job.phase_end == 3 and not job.trained_on
    assert len(job.loaders.train.rows) == 8
    absent = str(tmp_path / "step-000001")
    with pytest.raises(UserError, match=re.escape(absent)):
        AdapterJob.check_inputs(config, setup, World(), absent)


@pytest.mark.parametrize(
    ("facts", "done", "code", "writes"),
    [
        ({}, 5, 0, True),
        ({}, 4, RESUMABLE, False),
        ({"evaluation_stopped": True}, 5, RESUMABLE, False),
        ({"stopped_early": True}, 3, 0, True),
        ({"is_phase_over": True}, 2, None, False),
    ],
)
def test_results_are_written_at_the_end(
    facts: dict[str, Any], done: int, code: int | None, writes: bool
) -> None:
    written: list[bool] = []
    train = SimpleNamespace(early_stop=2, metric_for_best="loss")
    trainer: Any = SimpleNamespace(
        **{
            "is_phase_over": False,
            "stopped_early": False,
            "evaluation_stopped": False,
            "total_steps": 5,
            "config": SimpleNamespace(train=train),
            "finish_run": lambda: written.append(True),
            **facts,
        }
    )
    assert end_training(trainer, done) == code
    assert bool(written) == writes
