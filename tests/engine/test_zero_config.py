"""A user's DeepSpeed JSON is merged, and refused where it contradicts the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.zero_config import build_deepspeed_config, shrink_reduce_bucket


def made(tmp_path: Path, content: Any, ranks: int = 2, **engine: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = EngineConfig(kind="zero", deepspeed_config=str(path), **engine)
    return build_deepspeed_config(config, TrainConfig(global_batch=16, micro_batch=2), ranks)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_a_file(stage: int) -> None:
    config = build_deepspeed_config(EngineConfig(kind="zero", stage=stage), TrainConfig(), 4)
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_batch_size"] == 4 and config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.0, "DeepSpeed's default would be 1.0"
    assert not {"bf16", "fp16", "optimizer"} & set(config)


def test_the_file_adds_what_the_run_does_not_say(tmp_path: Path) -> None:
    config = made(
        tmp_path,
        {
            "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 1000},
            "comms_logger": {"enabled": True},
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": "auto"},
            "steps_per_print": 7,
        },
    )
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["comms_logger"] == {"enabled": True} and config["steps_per_print"] == 7
    assert "bf16" not in config and config["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            r"zero_optimization.stage = 2 but .* engine.stage is 3",
        ),
        ({"train_batch_size": 8}, "train_batch_size = 8 but the run's train.global_batch is 16"),
        ({"train_micro_batch_size_per_gpu": 1}, "run's train.micro_batch is 2"),
        ({"gradient_accumulation_steps": 2}, "number of micro-batches a step is 4"),
        ({"gradient_clipping": 0.5}, "train.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "enables bf16, with which DeepSpeed casts parameters"),
        ({"fp16": {"enabled": True}}, "enables fp16"),
        ({"optimizer": {"type": "Adam"}}, "section 'optimizer', which belongs to train.optimizer"),
        ({"scheduler": {}}, "belongs to train.schedule"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine.cpu_offload"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        ([1], "not a DeepSpeed configuration"),
        ({"zero_optimization": 3}, "not a DeepSpeed configuration"),
        ("{", "is not JSON"),
    ],
)
def test_contradictions(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, content)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = EngineConfig(kind="zero", deepspeed_config=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"engine.deepspeed_config: cannot read .*none.json"):
        build_deepspeed_config(config, TrainConfig(), 2)


def test_offload(tmp_path: Path) -> None:
    file = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    config = made(tmp_path, file, cpu_offload="optimizer")
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    config = made(tmp_path, {}, cpu_offload="optimizer")
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    file["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    with pytest.raises(UserError, match=r"offload_optimizer.device = \"nvme\""):
        made(tmp_path, file, cpu_offload="optimizer")


def test_bucket_is_no_larger_than_the_gradients(tmp_path: Path) -> None:
    config = made(tmp_path, {})
    size = config["zero_optimization"]["reduce_bucket_size"]
    assert shrink_reduce_bucket(config, 2 * size) == config
    small = shrink_reduce_bucket(config, 120)
    assert small["zero_optimization"] == {**config["zero_optimization"], "reduce_bucket_size": 120}
    assert config["zero_optimization"]["reduce_bucket_size"] == size
