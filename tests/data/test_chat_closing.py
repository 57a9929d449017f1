import pytest

from dist_peft.data.chat_closing import find_turn_ends
from dist_peft.data.chat_template import ChatTemplate
from tests.support.chat_families import FAMILIES, Family
from tests.support.data_files import byte_tokenizer


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_ends_the_turns_of_each_family(family: Family) -> None:
    assert find_turn_ends(ChatTemplate(family.tokenizer())).tokens == tuple(family.ends)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_only_templates_that_close_no_last_turn_need_the_next_marker(family: Family) -> None:
    ends = find_turn_ends(ChatTemplate(family.tokenizer()))
    glm = family.name.startswith("glm")
    assert ends.append == ("<|user|>" if glm else None)
    assert ends.append_call == ("<|observation|>" if glm else None)


def test_tokenizer_without_template_ends_turns_with_eos() -> None:
    assert find_turn_ends(ChatTemplate(byte_tokenizer())).tokens == ("</s>",)


def test_a_template_given_by_hand_counts_instead_of_the_tokenizers() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    assert find_turn_ends(ChatTemplate(tokenizer, FAMILIES["zephyr"].template)).tokens == ("</s>",)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|stop|>' }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{{ 1 / 0 }}",
        "nothing of the conversation",
    ],
    ids=["plain", "marker is no token", "refuses", "fails", "constant"],
)
def test_templates_that_end_turns_with_no_token(template: str) -> None:
    assert find_turn_ends(ChatTemplate(byte_tokenizer(), template)).tokens == ()
