"""Opening a merger; the mergers themselves are tested by method."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.mergers import open_adapter_merger, open_merger
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError

PROMPT = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 3,
    "token_dim": 5,
}


def test_a_refusal_names_the_directory(tmp_path: Path) -> None:
    public = PublicAdapter(PROMPT, {"prompt_embeddings": torch.ones(3, 5)})
    write_adapter_directory(tmp_path / "adapter", public, {})
    with pytest.raises(UserError, match=r"adapter: the adapter is PROMPT_TUNING: virtual tokens"):
        open_adapter_merger(tmp_path / "adapter")


def test_trained_weights_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "dist_peft.json").write_text('{"kind": "full"}')
    with ExitStack() as stack, pytest.raises(UserError, match="safetensors"):
        open_merger(tmp_path, {}, stack, tied=False)
