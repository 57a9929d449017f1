import pytest

from dist_peft.core.errors import UserError


def test_a_user_error_is_a_value_error_whose_text_is_the_message() -> None:
    with pytest.raises(ValueError, match="key lr is wrong") as caught:
        raise UserError("key lr is wrong")
    assert str(caught.value) == "key lr is wrong"
