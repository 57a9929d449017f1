"""The package speaks the field's language: the limits of ``tests/support/language.py``."""

from pathlib import Path

import pytest

from tests.support.language import (
    BANNED_IDIOMS,
    MAX_ONE_WORD_SHARE,
    MAX_WHAT_PER_10000,
    MIN_MEAN_NAME_LENGTH,
    LanguageTable,
    find_python_files,
    iterate_phrases,
    list_function_names,
    list_what_places,
    measure_language,
)

PACKAGE = Path(__file__).parents[1] / "dist_peft"


@pytest.fixture(scope="module")
def table() -> LanguageTable:
    return measure_language(find_python_files(PACKAGE))


def test_no_banned_idiom_in_docstrings_comments_and_messages(table: LanguageTable) -> None:
    assert not table.idioms, "\n".join(table.idioms)


def test_what_is_rare(table: LanguageTable) -> None:
    if table.rates["what"] > MAX_WHAT_PER_10000:
        pytest.fail("\n".join(list_what_places(find_python_files(PACKAGE))))


def test_function_names_are_verbs_with_nouns(table: LanguageTable) -> None:
    assert table.mean_name_length >= MIN_MEAN_NAME_LENGTH, table.format_rows()
    assert table.one_word_share <= MAX_ONE_WORD_SHARE, table.format_rows()


def test_no_banned_idiom_in_the_documentation() -> None:
    root = PACKAGE.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    pages.remove(root / "docs" / "decisions" / "renames.md")  # has the old names
    found = [
        f"{page}: {match.group(0)}"
        for page in pages
        for match in BANNED_IDIOMS.finditer(page.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_table_counts_comments_docstrings_messages_and_names(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Say what it is."""\n\n\n'
        "def _read_rows():  # what is mended\n"
        '    raise ValueError(f"nobody {1} knows")\n\n\n'
        "def __len__():\n"
        "    pass\n"
    )
    table = measure_language([path])
    assert table.rates["what"] == 10_000 * 2 / table.words
    assert sorted(place.rpartition(": ")[2] for place in table.idioms) == ["mended", "nobody"]
    assert list_function_names(path) == ["read_rows"] and table.one_word_share == 0
    assert next(phrase.place for phrase in iterate_phrases(path)) == f"{path}:4"
