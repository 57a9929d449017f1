"""The synonym file, good and malformed."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_peft.core.errors import UserError
from dist_peft.data.synonyms import read_synonym_file

KEY = "data.train[0].augment.synonyms"


def test_lines_of_words(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("# made by hand\nGood: fine,  well   behaved , good,fine\n\nÄrger: Wut\n")
    assert read_synonym_file(str(file), KEY) == {
        "good": ("fine", "well behaved"),
        "ärger": ("Wut",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good fine\n", "line 1 must be 'word: synonym, synonym' with one word, not 'good fine'"),
        ("a: b\nvery good: fine\n", "line 2 must be"),
        ("a: b\n\n: fine\n", "line 3 must be"),
        ("good: Good, ,\n", "line 1: good has no synonym"),
        ("a: b\nc: d\nA: e\n", "line 3: a stands on line 1 already"),
        ("# nothing\n", "holds no line such as"),
        (b"a: \xff\n", "is not UTF-8 text"),
        (None, "cannot be read: no such file or directory"),
    ],
)
def test_malformed_files_are_refused(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    file = tmp_path / "synonyms.txt"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        read_synonym_file(str(file), KEY)
    assert message in str(caught.value) and str(caught.value).startswith(f"{KEY}: {file}")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(alphabet=":,#ab \n\tÄ\x85", max_size=30))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text(text, encoding="utf-8")
    try:
        found = read_synonym_file(str(file), KEY)
    except UserError:
        return
    for word, synonyms in found.items():
        assert len(word.split()) == 1 and word == word.lower()
        assert synonyms and all(s.strip() == s and s.lower() != word for s in synonyms)
