"""Scores of generated texts against references, as pure functions; each is a mean over examples, 0 to 100.

A prediction without content scores 0 and stays in the denominator, whatever its reference.
Words are counted in Unicode: `rouge-score`'s own tokenizer deletes all but a-z and 0-9, and so Chinese
altogether.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rapidfuzz import fuzz

# Letters of scripts written without spaces between words: Han, and the Japanese syllabaries.
_CJK = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
# What Py150 writes in the place of a rare literal, and around a common one. The quotes of a string stand
# outside. Literals that hold ">" come out right too: what follows the first ">" stays where it is.
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>")
_RARE_LITERALS = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}


@dataclass(frozen=True)
class Score:
    """A score by name: `function(predictions, references)`, or `function(sources, predictions, references)`."""

    function: Callable[..., float]
    needs_sources: bool = False


class RougeL(NamedTuple):
    """Of one prediction, 0 to 1: longest common subsequence over its length, over the reference's, and F1."""

    precision: float
    recall: float
    f1: float


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """How many predictions are their reference, but for case and white space. "15" is not "1"."""
    _check(predictions=predictions, references=references)
    pairs = zip(map(_normalised, predictions), map(_normalised, references), strict=True)
    return _mean(100.0 * (bool(found) and found == wanted) for found, wanted in pairs)


def first_character(predictions: Sequence[str], references: Sequence[str]) -> float:
    """How many predictions begin with the character their reference begins with, after white space."""
    _check(predictions=predictions, references=references)
    pairs = zip(predictions, references, strict=True)
    firsts = ((found.lstrip()[:1], wanted.lstrip()[:1]) for found, wanted in pairs)
    return _mean(100.0 * (bool(found) and found == wanted) for found, wanted in firsts)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of ROUGE-L."""
    _check(predictions=predictions, references=references)
    return _mean(100.0 * each.f1 for each in rouge_l_each(predictions, references))


def rouge_l_each(predictions: Sequence[str], references: Sequence[str]) -> list[RougeL]:
    """Precision, recall and F1 of ROUGE-L, 0 to 1, for each example."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second: it imports nltk

    _check(predictions=predictions, references=references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    pairs = zip(predictions, references, strict=True)
    return [RougeL(*scorer.score(target=wanted, prediction=found)["rougeL"]) for found, wanted in pairs]


def edit_similarity(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean 100 (1 - insertions and deletions / (both lengths)) of the first lines of code, literals restored."""
    _check(predictions=predictions, references=references)
    pairs = zip(map(_line_of_code, predictions), map(_line_of_code, references), strict=True)
    return _mean(fuzz.ratio(found, wanted) if found else 0.0 for found, wanted in pairs)


def sari(sources: Sequence[str], predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Mean SARI (Xu et al. 2016): what was rightly kept, added and deleted of n-grams, n = 1 to 4.

    A reference is one text or several of equal weight. It counts as the package `evaluate` does, for
    results that compare: 0/0 is 1, and an n-gram the source repeats is deleted only as far as neither
    the prediction nor the reference has it, so that a perfect prediction may stay below 100.
    """
    _check(sources=sources, predictions=predictions, references=references)
    scores = []
    for source, found, wanted in zip(sources, predictions, references, strict=True):
        texts = [wanted] if isinstance(wanted, str) else wanted
        if not texts:
            raise ValueError("an example has no reference: give each at least one text")
        scores.append(_sari(words(source), words(found), [words(text) for text in texts]))
    return _mean(scores)


SCORES: dict[str, Score] = {
    "accuracy": Score(exact_match),
    "first-character": Score(first_character),
    "rouge-l": Score(rouge_l),
    "edit-similarity": Score(edit_similarity),
    "sari": Score(sari, needs_sources=True),
}


def words(text: str) -> list[str]:
    """Words without case and punctuation; Chinese and Japanese characters one by one."""
    return _WORD.findall(_caseless(text))


class _Tokenizer:
    """`words` in the shape that `rouge-score` asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _caseless(text: str) -> str:
    # Composed, since the dots of a decomposed umlaut are no part of a word to `re`.
    return unicodedata.normalize("NFC", text.casefold())


def _normalised(text: str) -> str:
    return " ".join(_caseless(text).split())


def _line_of_code(text: str) -> str:
    """The first line that is not blank, without markers and with its literals."""
    text = text.replace("<EOL>", "\n").replace("<s>", "").replace("</s>", "")
    line = text.strip().partition("\n")[0].strip()
    for marker, literal in _RARE_LITERALS.items():
        line = line.replace(marker, literal)
    return _LITERAL.sub(r"\1", line)


def _sari(source: list[str], prediction: list[str], references: list[list[str]]) -> float:
    if not prediction:
        return 0.0
    parts = []
    for n in range(1, 5):
        wanted = sum((_ngrams(reference, n) for reference in references), Counter[tuple[str, ...]]())
        # As often as if each reference had a source and a prediction of its own.
        given, found = (
            Counter({gram: times * len(references) for gram, times in _ngrams(tokens, n).items()})
            for tokens in (source, prediction)
        )
        kept, deleted = given & found, given - found
        rightly_kept = kept & wanted
        new, wanted_new = found.keys() - given.keys(), wanted.keys() - given.keys()
        rightly_new = len(new & wanted_new)
        parts += [
            _f1(_mean_share(rightly_kept, kept), _ratio(rightly_kept.total(), (given & wanted).total())),
            _f1(_ratio(rightly_new, len(new)), _ratio(rightly_new, len(wanted_new))),
            _mean_share(deleted - wanted, deleted),
        ]
    return 100.0 * math.fsum(parts) / len(parts)


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _mean_share(part: Counter[tuple[str, ...]], whole: Counter[tuple[str, ...]]) -> float:
    """Mean over the n-grams of `whole` of how much of their count is in `part`."""
    return _ratio(math.fsum(part[gram] / times for gram, times in whole.items()), len(whole))


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _mean(scores: Iterable[float]) -> float:
    """Rounded once, so that the order of the examples cannot matter."""
    found = list(scores)
    return math.fsum(found) / len(found)


def _check(**texts: Sequence[str | Sequence[str]]) -> None:
    for name, given in texts.items():
        if isinstance(given, str):
            raise ValueError(f"{name} is a single text: put it in a list, one text for each example")
    lengths = {name: len(given) for name, given in texts.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"got {counts}: give one of each for every example, an empty text where none was generated")
    if not all(lengths.values()):
        raise ValueError("there are no examples to score: give at least one")
