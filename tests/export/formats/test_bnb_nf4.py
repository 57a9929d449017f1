"""``bnb-nf4``: forms, and the base that each needs."""

from pathlib import Path

import pytest
import torch

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.bnb_nf4 import BnbNf4Export
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import make_run


def test_forms() -> None:
    labels = [form.label for form in BnbNf4Export().forms]
    assert labels == ["bnb-nf4", "bnb-nf4 --keep-adapter"]


@pytest.mark.parametrize("quant", [None, QuantConfig(kind="int", group_size=32)], ids=str)
def test_codes_of_another_base(quant: QuantConfig | None, tmp_path: Path) -> None:
    run = make_run(tmp_path, quant)
    with pytest.raises(UserError, match="keeps the codes of an NF4 base"):
        export_model("bnb-nf4", run.job(tmp_path / "out", keep_adapter=True))
    assert not (tmp_path / "out").exists()
    assert not export_model("bnb-nf4", run.job(tmp_path / "out")).exact


def test_method_that_peft_has_not_on_these_linears(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig())
    job = run.job(tmp_path / "out", keep_adapter=True)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.hada_w{n}_{m}": torch.ones(1, 1) for n in (1, 2) for m in "ab"}
    public = PublicAdapter({"peft_type": "LOHA", "r": 1, "alpha": 1}, tensors)
    write_adapter_directory(job.adapter_dir, public, {})
    with pytest.raises(UserError, match="PEFT does not support this method; leave it out to merge"):
        export_model("bnb-nf4", job)
    assert not (tmp_path / "out").exists()
