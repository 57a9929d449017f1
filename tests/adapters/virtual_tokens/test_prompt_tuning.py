"""What prompt tuning starts from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_peft.core.config.run import PromptConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.hub import load_tokenizer
from tests.support import loaded_models
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_words
from tests.support.virtual_tokens import attach, load


def start(config: PromptConfig, directory: Path, family: str = "llama") -> tuple[Tensor, Tensor]:
    """The virtual tokens' start, read by ranks of two rows, and the base's embeddings."""
    save_model(CONFIGS[family], directory)
    save_words(directory)
    model = load(directory)
    encoder = attach(config, model).encoder
    rows = config.num_virtual_tokens
    spans = [Span(a, min(a + 2, rows)) for a in range(0, rows, 2)]
    value = torch.cat([encoder.init_rows("embedding", span) for span in spans])
    every = torch.arange(97)
    return value, model.get_input_embeddings()(every).detach()


@pytest.mark.parametrize(("count", "ids"), [(5, [5, 6, 7, 5, 6]), (2, [5, 6])])
def test_text_is_repeated_or_cut(count: int, ids: list[int], tmp_path: Path) -> None:
    config = PromptConfig(num_virtual_tokens=count, init="text", init_text="w5 w6 w7")
    value, embeddings = start(config, tmp_path)
    assert load_tokenizer(tmp_path)("w5 w6 w7")["input_ids"] == [5, 6, 7]
    assert torch.equal(value, embeddings[ids])


def test_text_in_a_family_that_scales_its_embeddings(tmp_path: Path) -> None:
    config = PromptConfig(num_virtual_tokens=2, init="text", init_text="w5 w6")
    value, embeddings = start(config, tmp_path, "gemma3")
    assert torch.equal(value, embeddings[[5, 6]])


def test_vocab_takes_rows_of_the_embedding(tmp_path: Path) -> None:
    value, embeddings = start(PromptConfig(num_virtual_tokens=4, init="vocab"), tmp_path)
    again, _ = start(PromptConfig(num_virtual_tokens=4, init="vocab"), tmp_path)
    assert torch.equal(value, again)
    assert all((embeddings == row).all(1).any() for row in value)
    assert len(value.unique(dim=0)) > 1


def test_text_with_tokens_beyond_the_base(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    save_words(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    config = PromptConfig(num_virtual_tokens=2, init="text", init_text="<new>")
    with pytest.raises(UserError, match=r"adapter.init_text '<new>' gives tokens \[97\]"):
        attach(config, load(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_text_on_a_packed_embedding_starts_from_its_rows(family: str, tmp_path: Path) -> None:
    save_model(CONFIGS[family], tmp_path)
    save_words(tmp_path)
    model = loaded_models.load(tmp_path, quant=QuantConfig(embeddings=True)).model
    config = PromptConfig(num_virtual_tokens=2, init="text", init_text="w5 w6")
    encoder = attach(config, model).encoder
    embedding: Any = model.get_input_embeddings()
    assert torch.equal(encoder.init_rows("embedding", Span(0, 2)), embedding(torch.tensor([5, 6])))
    assert encoder.base_dtype == torch.float32
