"""By the format's library, or block by block."""

from pathlib import Path

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.verification_choice import (
    AskedVerification,
    choose_verification,
    count_loaded_bytes,
)
from tests.support.export_runs import make_run
from tests.support.tiny_models import CONFIGS, save_model

GIB = 2**30


def choose(asked: AskedVerification, needed: int, *, has_blocks: bool = True) -> str:
    return choose_verification(
        asked, needed * GIB, 10 * GIB, library="transformers", has_blocks=has_blocks
    )


def test_auto_is_the_library_up_to_half_of_the_memory() -> None:
    assert (choose("auto", 5), choose("auto", 6)) == ("consumer", "blocks")
    assert (choose("consumer", 10), choose("blocks", 1)) == ("consumer", "blocks")
    assert choose("auto", 10, has_blocks=False) == "consumer"


@pytest.mark.parametrize(
    ("asked", "has_blocks", "fix"),
    [("consumer", True, "--verify blocks"), ("auto", False, "--no-verify")],
)
def test_too_little_memory_is_refused(asked: AskedVerification, has_blocks: bool, fix: str) -> None:
    with pytest.raises(UserError, match=rf"about 11.0 GiB, of which 10.0 GiB .*{fix}"):
        choose(asked, 11, has_blocks=has_blocks)


def test_a_form_without_blocks() -> None:
    with pytest.raises(UserError, match="compared by transformers only"):
        choose("blocks", 1, has_blocks=False)


def test_bytes_come_from_the_headers(tmp_path: Path) -> None:
    model = save_model(CONFIGS["llama"], tmp_path)
    numbers = sum(p.numel() for p in model.parameters())
    assert count_loaded_bytes(tmp_path, torch.bfloat16) == 2 * numbers


@pytest.mark.parametrize("name", ["bnb-nf4", "compressed-tensors"])
def test_packed_weights_count_dequantized(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", None, intermediate_size=128)
    options = {"merge": True, "lossy": True} if name == "compressed-tensors" else {}
    FORMATS[name].write_export(run.job(tmp_path / "out", **options))
    numbers = sum(value.numel() for value in run.trained.values())
    assert count_loaded_bytes(tmp_path / "out", torch.float32) == 4 * numbers
