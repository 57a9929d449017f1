from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train.attention_record import FusionAttention


def test_round_trip_and_damage(tmp_path: Path) -> None:
    assert FusionAttention.read_json(tmp_path) is None
    found = FusionAttention(["a"], ["m.2.output_adapters"], "tokens", 3, [[1.0]], {"x": [[1.0]]})
    found.write_json(tmp_path)
    assert FusionAttention.read_json(tmp_path) == found
    (tmp_path / "fusion_attention.json").write_text("{}")
    with pytest.raises(UserError, match=r"fusion_attention\.json is damaged"):
        FusionAttention.read_json(tmp_path)
