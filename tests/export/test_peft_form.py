"""How far PEFT's form of PiSSA and LoftQ is from the trained weights, against PEFT itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.peft_form import _sample_row_spans, measure_peft_form
from tests.support.tiny_runs import tiny_tree

NF4 = {"kind": "nf4", "group_size": 8}
SEEN_ROWS = 768
"""64 at most of each linear; those of the MLP have more."""


def finished_run(directory: Path, quant: dict[str, Any] | None, **adapter: Any) -> BaseConfig:
    settings = {"r": 3, "alpha": 6, **adapter}
    tree = tiny_tree(directory, base__quant=quant, adapter=settings, data__eval=[])
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    return load_config(directory / "run" / "config.yaml").base


def share_by_peft(directory: Path, base: BaseConfig) -> float:
    """Of all rows, by PEFT's own merge."""
    model = tf.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    peft = PeftModel.from_pretrained(model, str(directory / "run" / "adapter"))
    merged = dict(peft.merge_and_unload().named_parameters())  # type: ignore[operator]
    error = change = torch.zeros(())
    with open_merged_weights(
        base, directory / "base", directory / "run" / "adapter", "decoded"
    ) as walk:
        for weight in walk.weights:
            if walk.is_adapted(weight):
                trained = walk.read_merged_rows(weight, Span(0, weight.num_rows))
                error = error + (merged[weight.path].detach() - trained).square().sum()
                change = (
                    change + (merged[weight.path].detach() - before[weight.path]).square().sum()
                )
    return float((error / change).sqrt())


@pytest.mark.parametrize(
    ("quant", "adapter", "least"),
    [
        (NF4, {"init": "pissa"}, 0.1),
        (NF4, {"init": "loftq", "init_iterations": 3, "use_rslora": True}, 0.1),
        ({"kind": "int", "bits": 3, "group_size": 8}, {"init": "pissa"}, 0.1),
        (None, {"init": "pissa", "rank_pattern": {"q_proj": 2}}, 0.0),
    ],
    ids=["pissa", "loftq", "int3", "not quantized"],
)
def test_agrees_with_peft(
    tmp_path: Path, quant: dict[str, Any] | None, adapter: dict[str, Any], least: float
) -> None:
    base = finished_run(tmp_path, quant, **adapter)
    found = measure_peft_form(base, tmp_path / "base", tmp_path / "run" / "adapter")
    assert found is not None and found.linears == 14 and found.rows == SEEN_ROWS
    assert found.share == pytest.approx(share_by_peft(tmp_path, base), rel=0.02, abs=1e-4)
    assert found.share >= least and found.is_exact == (quant is None)


def test_dora_changes_nothing_at_its_start(tmp_path: Path) -> None:
    """Its magnitude is no change by training: of one that changed nearly nothing the share is
    large. And a base that is gone is the user's error."""
    adapter = {"r": 3, "alpha": 6, "init": "pissa", "use_dora": True}
    tree = tiny_tree(tmp_path, base__quant=NF4, adapter=adapter, data__eval=[], train__lr=1e-6)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    base = load_config(tmp_path / "run" / "config.yaml").base
    found = measure_peft_form(base, tmp_path / "base", tmp_path / "run" / "adapter")
    assert found is not None and 500 < found.share < 1e6
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="base"):
        measure_peft_form(base, tmp_path / "base", tmp_path / "run" / "adapter")


def test_adapters_that_start_from_zero_have_no_such_error(tmp_path: Path) -> None:
    base = finished_run(tmp_path, NF4)
    assert measure_peft_form(base, tmp_path / "base", tmp_path / "run" / "adapter") is None


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 79, 4096])
def test_rows_that_are_looked_at(rows: int) -> None:
    spans = list(_sample_row_spans(rows))
    found = [row for span in spans for row in range(span.start, span.stop)]
    assert min(found) >= 0 and max(found) == rows - 1 and found[0] == 0
    assert sum(map(len, spans)) == min(rows, 64)
    if rows <= 64 or rows > 200:
        assert len(set(found)) == len(found)
