"""The tiny base: learns, is an ordinary Hugging Face directory, is made once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_peft.core.errors import UserError
from dist_peft.model.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "base"


def test_made_loaded_reused(base: Path) -> None:
    losses: list[float] = []
    report = make_tiny_base(base, seconds=4, on_step=lambda step, loss, share: losses.append(loss))
    assert report.steps == len(losses) > 0
    assert not report.reused
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    model = AutoModelForCausalLM.from_pretrained(base)
    assert sum(p.numel() for p in model.parameters()) == report.parameters
    ids = torch.tensor([tokenizer(text).input_ids])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    assert make_tiny_base(base, seconds=4).reused
    with pytest.raises(UserError):
        make_tiny_base(base, seconds=5)


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no tiny base"):
        make_tiny_base(tmp_path, seconds=1)
    with pytest.raises(UserError, match="needs some time"):
        make_tiny_base(tmp_path / "x", seconds=0)
