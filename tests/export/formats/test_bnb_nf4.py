"""``bnb-nf4``: forms, and the base that each needs."""

from pathlib import Path

import pytest

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
