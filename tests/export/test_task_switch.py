"""The parts of a switch without a model; ``tests/app/test_task_switching.py`` has the whole."""

from pathlib import Path

import pytest
import torch

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.merge_record import MergeRecord
from dist_peft.export.task_switch import SwitchJob, _switch_bias_rows, switch_merged_directory

SPAN = Span(0, 5)


@pytest.mark.parametrize("integer", [True, False])
def test_zeros_are_found_again_from_biases(integer: bool) -> None:
    torch.manual_seed(0)
    scale = torch.rand(5, 3).half() / 50
    zero = (torch.rand(5, 3) * 15).half()
    zero = zero.round() if integer else zero
    bias = -scale.float() * zero.float()
    found = _switch_bias_rows("a.weight", bias, scale, 96, SPAN, None, None)
    assert torch.equal(found, bias)
    with pytest.raises(UserError, match=r"a\.weight: its biases are not those of the base's"):
        _switch_bias_rows("a.weight", bias * 1.0001, scale, 96, SPAN, None, None)


@pytest.mark.parametrize(
    ("keeps_zeros", "quant", "message"),
    [
        (False, None, "was merged without the base's zeros"),
        (True, {"kind": "nf4"}, "on a quantized base, which has more zeros"),
    ],
)
def test_zeros_that_the_directory_does_not_show(
    keeps_zeros: bool, quant: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    merged, adapter = tmp_path / "merged", tmp_path / "run" / "adapter"
    for directory in (merged, adapter):
        directory.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "MASKED_LORA"}')
    record = MergeRecord("hf-bf16", "original", "float32", None, keeps_zeros, base={"quant": quant})
    record.write_to_directory(merged)
    job = SwitchJob(merged, tmp_path / "out", None, adapter, BaseConfig(path="x"))
    with pytest.raises(UserError, match=f"run was trained with adapter.keep_zeros.*{message}"):
        switch_merged_directory(job)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_the_record_says_no(tmp_path: Path) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    merged.mkdir()
    job = SwitchJob(merged, out, None, None, BaseConfig(path="x"))
    for record, words in (
        (MergeRecord("gguf", "original", "float16", None), "were rounded after the merge"),
        (MergeRecord("mlx", "original", "float16", None), "were rounded after the merge"),
        (MergeRecord("hf-bf16", "original", "float32", "f00"), "holds another adapter"),
    ):
        record.write_to_directory(merged)
        with pytest.raises(UserError, match=words):
            switch_merged_directory(job)
        assert [p.name for p in tmp_path.iterdir()] == ["merged"]
