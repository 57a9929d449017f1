import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.messages import normalize_message


def test_both_forms_keep_other_keys() -> None:
    share = {"from": "gpt", "value": "a", "weight": 0, "name": None}
    assert normalize_message(share, "m") == {"role": "assistant", "content": "a", "weight": 0}
    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    assert normalize_message({"role": "user", "content": parts}, "m")["content"] == "ab"


@pytest.mark.parametrize("kind", ["image", "input_audio", "video", "file"])
def test_parts_that_are_no_text_are_named(kind: str) -> None:
    with pytest.raises(UserError, match=rf"m \(user\): .*part 1 of type {kind}"):
        normalize_message({"role": "user", "content": [{"type": kind}]}, "m")
