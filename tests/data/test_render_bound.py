import threading
import time

import pytest

from dist_peft.core.errors import UserError
from dist_peft.data import render_bound
from dist_peft.data.chat import ChatRenderer
from dist_peft.data.render_bound import find_resource_excess
from tests.support.data_files import byte_tokenizer

MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
_LOOP = "{% for i in range(99999) %}"
EXCESSIVE = {
    "loops in loops": (_LOOP * 3 + "{% endfor %}" * 3, "does not end within"),
    "text folded at compilation": ("{{ 'x' * 10 ** 10 }}", "GiB of memory"),
    "text": ("{{ messages[0].content * 10 ** 10 }}", "GiB of memory"),
    "power": ("{{ (messages | length) ** (10 ** 9) }}", "does not end within"),
}


@pytest.mark.parametrize(("template", "reason"), EXCESSIVE.values(), ids=EXCESSIVE)
@pytest.mark.parametrize("mark", [True, False])
def test_templates_without_end_are_refused(
    template: str, reason: str, mark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_bound, "_CPU_SECONDS", 1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    renderer = ChatRenderer(tokenizer, mark_assistant=mark, starts_with_bos=True)
    with pytest.raises(UserError, match=f"f, record 1: the chat template.*{reason}"):
        renderer.render_conversation(MESSAGES, None, "f, record 1")


def test_the_bound_holds_in_a_thread() -> None:
    found: list[str | None] = []

    def endless() -> None:
        while True:
            pass

    thread = threading.Thread(target=lambda: found.append(find_resource_excess(endless, 1)))
    thread.start()
    thread.join()
    assert found == ["it does not end within 1 seconds"]


def test_what_ends_or_fails_or_waits_is_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_resource_excess(lambda: "x" * 1000) is None
    assert find_resource_excess(lambda: 1 / 0) is None
    monkeypatch.setattr(render_bound, "_WALL_SECONDS", 0.2)
    assert find_resource_excess(lambda: time.sleep(60)) is None
