"""EDA against the program of its authors, with the same draws."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from dist_peft.core.config.augment import EdaConfig
from dist_peft.core.seeds import RandomDraws
from dist_peft.data import eda as module
from dist_peft.data.eda import EdaAugmenter, keep_letters

SYNONYMS = {
    "sad": ("lamentable", "pitiful", "sorry"),
    "superior": ("higher ranking", "master"),
    "human": ("person",),
    "comedy": ("drollery", "clowning", "funniness"),
    "back": ("rear", "spinal column"),
    "the": ("this one",),
}
TEXTS = [
    "A sad, superior human comedy played out on the back roads of life.",
    "the human in the back",
    "sad",
    "It isn't sad - it's 100% superior; the human comedy's back, back, back!",
    "zzz yyy xxx",
]


class Reference:
    """``eda.py`` of the authors (github.com/jasonwei20/eda_nlp), its steps and names, with draws
    from outside and words in the order of their first occurrence where it takes them of a set."""

    def __init__(self, draws: RandomDraws) -> None:
        self.draws = draws

    def randint(self, low: int, high: int) -> int:
        return low + self.draws.draw_index(high - low + 1)

    def synonym_replacement(self, words: list[str], n: int) -> list[str]:
        new_words = words.copy()
        random_word_list = list(dict.fromkeys(w for w in words if w not in module._STOP_WORDS))
        self.draws.shuffle(random_word_list)
        num_replaced = 0
        for random_word in random_word_list:
            synonyms = SYNONYMS.get(random_word, ())
            if len(synonyms) >= 1:
                synonym = synonyms[self.randint(0, len(synonyms) - 1)]
                new_words = [synonym if word == random_word else word for word in new_words]
                num_replaced += 1
            if num_replaced >= n:
                break
        return " ".join(new_words).split(" ")

    def random_deletion(self, words: list[str], p: float) -> list[str]:
        if len(words) == 1:
            return words
        new_words = []
        for word in words:
            r = self.draws.draw_uniform()
            if r > p:
                new_words.append(word)
        if len(new_words) == 0:
            return [words[self.randint(0, len(words) - 1)]]
        return new_words

    def random_swap(self, words: list[str], n: int) -> list[str]:
        new_words = words.copy()
        for _ in range(n):
            new_words = self.swap_word(new_words)
        return new_words

    def swap_word(self, new_words: list[str]) -> list[str]:
        i = self.randint(0, len(new_words) - 1)
        j = i
        counter = 0
        while j == i:
            j = self.randint(0, len(new_words) - 1)
            counter += 1
            if counter > 3:
                return new_words
        new_words[i], new_words[j] = new_words[j], new_words[i]
        return new_words

    def random_insertion(self, words: list[str], n: int) -> list[str]:
        new_words = words.copy()
        for _ in range(n):
            self.add_word(new_words)
        return new_words

    def add_word(self, new_words: list[str]) -> None:
        synonyms: tuple[str, ...] = ()
        counter = 0
        while len(synonyms) < 1:
            synonyms = SYNONYMS.get(new_words[self.randint(0, len(new_words) - 1)], ())
            counter += 1
            if counter >= 10:
                return
        new_words.insert(self.randint(0, len(new_words) - 1), synonyms[0])

    def eda(self, sentence: str, alpha: float, num_aug: int) -> list[str]:
        words = [word for word in get_only_chars(sentence).split(" ") if word != ""]
        n = max(1, int(alpha * len(words)))
        ways: list[tuple[Callable[[list[str], Any], list[str]], float]] = [
            (self.synonym_replacement, n),
            (self.random_insertion, n),
            (self.random_swap, n),
            (self.random_deletion, alpha),
        ]
        augmented = [
            " ".join(way(words, size)) for way, size in ways for _ in range(int(num_aug / 4) + 1)
        ]
        augmented = [get_only_chars(sentence) for sentence in augmented]
        self.draws.shuffle(augmented)
        return augmented[:num_aug]


def get_only_chars(line: str) -> str:
    clean_line = ""
    for old, new in (("\u2019", ""), ("'", ""), ("-", " "), ("\t", " "), ("\n", " ")):
        line = line.replace(old, new)
    for char in line.lower():
        clean_line += char if char in "qwertyuiopasdfghjklzxcvbnm " else " "
    clean_line = re.sub(" +", " ", clean_line)
    return clean_line[1:] if clean_line[0] == " " else clean_line


def config(**changes: Any) -> EdaConfig:
    return EdaConfig(**{"kind": "eda", "synonyms": "unused.txt", **changes})


@pytest.mark.parametrize("num_aug", [1, 4, 9])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_variants_are_the_authors(alpha: float, num_aug: int) -> None:
    shares = {"alpha_sr": alpha, "alpha_ri": alpha, "alpha_rs": alpha, "p_rd": alpha}
    made = EdaAugmenter(config(num_aug=num_aug, letters_only=True, **shares), SYNONYMS)
    seen = set()
    for text in TEXTS:
        assert keep_letters(text) == get_only_chars(text)
        for seed in range(20):
            found = made.make_variants(text, RandomDraws(seed))
            assert found == Reference(RandomDraws(seed)).eda(text, alpha, num_aug)
            seen |= set(found)
    assert len(seen) > 15


def test_without_letters_only_words_without_punctuation_are_treated_alike() -> None:
    """On a text of small letters both forms make the same variants."""
    for seed in range(20):
        forms = [
            EdaAugmenter(config(letters_only=only), SYNONYMS).make_variants(
                "a sad superior human comedy on the back roads", RandomDraws(seed)
            )
            for only in (True, False)
        ]
        assert forms[0] == forms[1]


def test_case_punctuation_lines_and_white_space_at_the_ends_stay() -> None:
    only = {"alpha_ri": 0, "alpha_rs": 0, "p_rd": 0, "num_aug": 1}
    text = "  (Sad) Human!\n\nBack: "
    made = EdaAugmenter(config(alpha_sr=1, **only), {"sad": ("sorry",), "human": ("person",)})
    assert made.make_variants(text, RandomDraws(0)) == ["  (Sorry) Person!\n\nBack: "]
    swap = EdaAugmenter(config(alpha_sr=0, **{**only, "alpha_rs": 0.1, "num_aug": 3}), {})
    for variant in swap.make_variants(text, RandomDraws(1)):
        assert sorted(variant.split()) == sorted(text.split())
        assert re.sub(r"\S+", "x", variant) == "  x x\n\nx "
    delete = EdaAugmenter(config(alpha_sr=0, **{**only, "p_rd": 0.6, "num_aug": 40}), {})
    found = set(delete.make_variants("one two\nthree four", RandomDraws(2)))
    assert "one\nfour" in found and "three four" in found and len(found) >= 12


def test_few_ways_make_enough_variants_and_no_word_makes_copies() -> None:
    made = EdaAugmenter(config(alpha_sr=0, alpha_ri=0, alpha_rs=0, num_aug=7, synonyms=None), {})
    assert len(made.make_variants("one two three", RandomDraws(0))) == 7
    assert made.make_variants(" \n", RandomDraws(0)) == [" \n"] * 7
    letters = EdaAugmenter(config(letters_only=True, num_aug=2), SYNONYMS)
    assert letters.make_variants("123 !", RandomDraws(0)) == ["123 !"] * 2
