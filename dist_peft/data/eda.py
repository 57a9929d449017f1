"""EDA (Wei & Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
Classification Tasks", EMNLP 2019): four ways to change a text, each at random places.

::

    SR  replace     n = max(1, alpha_sr L) different words that are no stop words, by a synonym
    RI  insert      n = max(1, alpha_ri L) times the first synonym of a random word, anywhere
    RS  swap        n = max(1, alpha_rs L) times two words
    RD  delete      each word with probability p_rd, but one stays

A variant is made in one of these ways. As in the authors' program ``num_aug // 4 + 1`` variants of
each way are made, shuffled, and the first ``num_aug`` kept. There, with fewer than four ways, fewer
than ``num_aug`` may be made; here 4 is the number of ways that are used, so that there are always
enough. With ``letters_only``, and the same draws, the variants are the authors'.

Otherwise case, punctuation and white space are kept: a word stands between white space, and
is compared without the punctuation around it and in lower case.
"""

import re
import string
from collections.abc import Callable
from typing import NamedTuple

from dist_peft.core.config.augment import EdaConfig
from dist_peft.core.seeds import RandomDraws
from dist_peft.data.synonyms import Synonyms

__all__ = ["EdaAugmenter", "keep_letters"]

# the authors' list, of NLTK
_STOP_WORD_LIST = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she
her hers herself it its itself they them their theirs themselves what which who whom this that
these those am is are was were be been being have has had having do does did doing a an the and
but if or because as until while of at by for with about against between into through during
before after above below to from up down in out on off over under again further then once here
there when where why how all any both each few more most other some such no nor not only own
same so than too very s t can will just don should now
""".split()  # noqa: SIM905
_STOP_WORDS = frozenset(_STOP_WORD_LIST)
_QUOTE = "\N{RIGHT SINGLE QUOTATION MARK}"
_PUNCTUATION = (
    string.punctuation + "\N{LEFT SINGLE QUOTATION MARK}\N{EN DASH}\N{EM DASH}“”«»…" + _QUOTE
)


class _Word(NamedTuple):
    text: str
    gap: str
    """White space behind it."""

    @property
    def key(self) -> str:
        return self.text.strip(_PUNCTUATION).lower() or self.text


class EdaAugmenter:
    """Make variants of a text.

    Args:
        config: shares of the words, and number of variants.
        synonyms: of words in lower case; empty where neither SR nor RI is used.
    """

    def __init__(self, config: EdaConfig, synonyms: Synonyms) -> None:
        self._config, self._synonyms = config, synonyms

    def make_variants(self, text: str, draws: RandomDraws) -> list[str]:
        """Return ``num_aug`` variants of ``text``; copies of it if it has no word."""
        config = self._config
        clean = keep_letters(text).strip() if config.letters_only else text
        start, words, end = _split_into_words(clean)
        if not words:
            return [text] * config.num_aug
        ways: list[tuple[float, Callable[[list[_Word], RandomDraws], list[_Word]]]] = [
            (config.alpha_sr, self._replace_by_synonyms),
            (config.alpha_ri, self._insert_synonyms),
            (config.alpha_rs, self._swap_words),
            (config.p_rd, self._delete_words),
        ]
        used = [way for share, way in ways if share > 0]
        made = [
            way(list(words), draws) for way in used for _ in range(config.num_aug // len(used) + 1)
        ]
        found = [start + _join_words(variant) + end for variant in made]
        if config.letters_only:
            found = [keep_letters(variant) for variant in found]
        draws.shuffle(found)
        return found[: config.num_aug]

    def _find_synonyms(self, word: _Word) -> tuple[str, ...]:
        return self._synonyms.get(word.key, ())

    def _replace_by_synonyms(self, words: list[_Word], draws: RandomDraws) -> list[_Word]:
        count = max(1, int(self._config.alpha_sr * len(words)))
        candidates = list({w.key: w for w in words if w.key not in _STOP_WORDS}.values())
        draws.shuffle(candidates)
        replaced = 0
        for candidate in candidates:
            if synonyms := self._find_synonyms(candidate):
                synonym, key = synonyms[draws.draw_index(len(synonyms))], candidate.key
                words = [_replace_core(w, synonym) if w.key == key else w for w in words]
                replaced += 1
            if replaced >= count:
                break
        return words

    def _insert_synonyms(self, words: list[_Word], draws: RandomDraws) -> list[_Word]:
        for _ in range(max(1, int(self._config.alpha_ri * len(words)))):
            for trial in range(10):  # the authors' tenth is drawn and not used
                synonyms = self._find_synonyms(words[draws.draw_index(len(words))])
                if synonyms and trial < 9:
                    words.insert(draws.draw_index(len(words)), _Word(synonyms[0], " "))
                    break
        return words

    def _swap_words(self, words: list[_Word], draws: RandomDraws) -> list[_Word]:
        for _ in range(max(1, int(self._config.alpha_rs * len(words)))):
            first = draws.draw_index(len(words))
            for trial in range(4):  # the authors' fourth is drawn and not used
                second = draws.draw_index(len(words))
                if second != first and trial < 3:
                    a, b = words[first], words[second]
                    words[first], words[second] = _Word(b.text, a.gap), _Word(a.text, b.gap)
                    break
        return words

    def _delete_words(self, words: list[_Word], draws: RandomDraws) -> list[_Word]:
        if len(words) == 1:
            return words
        kept: list[_Word] = []
        for word in words:
            if draws.draw_uniform() > self._config.p_rd:
                kept.append(word)
            elif kept and "\n" in word.gap:  # the end of a line stays
                kept[-1] = kept[-1]._replace(gap=word.gap)
        return kept or [words[draws.draw_index(len(words))]]


def keep_letters(text: str) -> str:
    """Return ``text`` in lower case with letters a to z and single spaces only: the authors'
    ``get_only_chars``, except that a space at the start of an empty text is no error."""
    for old, new in ((_QUOTE, ""), ("'", ""), ("-", " ")):
        text = text.replace(old, new)
    return re.sub(" +", " ", re.sub("[^a-z ]", " ", text.lower())).removeprefix(" ")


def _split_into_words(text: str) -> tuple[str, list[_Word], str]:
    """Return the white space at the start, the words, and the white space at the end."""
    found = re.findall(r"(\S+)(\s*)", text)
    words = [_Word(word, gap) for word, gap in found]
    start = text[: len(text) - len(text.lstrip())]
    if not words:
        return start, [], ""
    end = words[-1].gap
    words[-1] = words[-1]._replace(gap=" ")
    return start, words, end


def _join_words(words: list[_Word]) -> str:
    return "".join(word.text + word.gap for word in words).rstrip()


def _replace_core(word: _Word, synonym: str) -> _Word:
    """Put ``synonym`` between the punctuation around ``word``, capitalized as it is."""
    core = word.text.strip(_PUNCTUATION)
    if core[:1].isupper():
        synonym = synonym[:1].upper() + synonym[1:]
    return word._replace(text=word.text.replace(core, synonym, 1) if core else synonym)
