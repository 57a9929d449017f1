"""``app.document_isolation``: what every verb that computes packed rows checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dist_peft.app import cli
from dist_peft.app.document_isolation import check_document_isolation, count_packed_tokens
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from tests.support.tiny_runs import save_config, tiny_tree


@pytest.fixture
def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token gets a share of the token before it, of whatever document."""
    forward: Any = LlamaDecoderLayer.forward

    def leaking(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = nn.functional.pad(hidden_states, (0, 0, 1, -1))
        return forward(self, hidden_states + 0.01 * before, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", leaking)


def test_rows_of_one_document_are_not_tried(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path, data__packing=False))
    assert count_packed_tokens(config) == 0
    config = parse_config(tiny_tree(tmp_path, data__packing=True, data__seq_len=48))
    assert count_packed_tokens(config) == 48


@pytest.mark.usefixtures("leak")
def test_eval_refuses_packed_rows_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loss would be that of documents that see each other."""
    config = str(save_config(tmp_path, tiny_tree(tmp_path, adapter={"kind": "none"})))

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("dist_peft.app.evaluation.load_weights", load)
        assert cli.main(["eval", "--config", config, "data.packing=true"]) == 2
        assert "lets packed documents see each other" in capsys.readouterr().err
    assert cli.main(["eval", "--config", config, "data.packing=false"]) == 0


@pytest.mark.usefixtures("leak")
def test_a_loaded_model_is_tried_too(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path, data__packing=True))
    world = World()
    built = load_weights(build_model(resolve_config(config)), world, torch.device("cpu"))
    with pytest.raises(UserError, match=r"see each other; set data\.packing: false"):
        check_document_isolation(built, config)
    packing = config.data.model_copy(update={"packing": False})
    check_document_isolation(built, config.model_copy(update={"data": packing}))
