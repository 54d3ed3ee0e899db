from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_ray.objectives import scores
from treelora_ray.objectives.scores import SCORES

ROOT = Path(__file__).parents[2]
PAIRED = [name for name, score in SCORES.items() if not score.needs_sources]

texts = st.text(max_size=20)
# At least one letter in its first line, whichever way it is cut.
full_texts = st.text("abÄßéあ中文 1_-.<>", max_size=20).map(lambda text: "x" + text)


def lists(strategy: st.SearchStrategy[str], width: int) -> st.SearchStrategy[list[tuple[str, ...]]]:
    return st.lists(st.tuples(*[strategy] * width), min_size=1, max_size=5)


def of(name: str, rows: Sequence[Sequence[str]]) -> float:
    """The score by name of rows (source, prediction, reference); the source is left out where none is needed."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return SCORES[name].function(*(columns if SCORES[name].needs_sources else columns[-2:]))


def test_the_names_say_which_scores_need_sources() -> None:
    assert {name: score.needs_sources for name, score in SCORES.items()} == {
        "accuracy": False,
        "first-character": False,
        "rouge-l": False,
        "edit-similarity": False,
        "sari": True,
    }


def test_exact_match_ignores_case_and_white_space_on_both_sides() -> None:
    assert scores.exact_match([" Hawkish \n"], ["hawkish"]) == 100
    assert scores.exact_match(["hawkish"], [" Hawkish\n"]) == 100
    assert scores.exact_match(["a  \t b"], ["A b"]) == 100
    assert scores.exact_match(["STRASSE", "für"], ["Straße", "fu\u0308r"]) == 100
    assert scores.exact_match(["支持\u3000"], ["支持"]) == 100
    assert scores.exact_match(["a", "b", "c"], ["a", "b", "d"]) == pytest.approx(200 / 3)


@pytest.mark.parametrize(("prediction", "reference"), [("1", "15"), ("15", "1"), ("ab", "a b"), ("1.", "1")])
def test_a_prefix_is_no_match(prediction: str, reference: str) -> None:
    assert scores.exact_match([prediction], [reference]) == 0


def test_first_character_skips_white_space_only() -> None:
    assert scores.first_character(["\n B. because", "A"], ["B", " A\n"]) == 100
    assert scores.first_character(["(B)", "BA", "b"], ["B", "A", "B"]) == 0
    assert scores.first_character(["A", "B", "C", "D"], ["A", "C", "B", "A"]) == 25


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence is "the cat lay": 3 of the prediction's 4 words, 3 of the reference's 6.
    found, wanted = "The cat lay there.", "the black cat that lay down"
    each = scores.rouge_l_each([found], [wanted])
    assert each == [pytest.approx((3 / 4, 3 / 6, 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6)))]
    assert (each[0].precision, each[0].recall) == (3 / 4, 3 / 6)
    assert scores.rouge_l([found], [wanted]) == pytest.approx(60)
    assert scores.rouge_l([found, "the", "dog"], [wanted, "the", "cat"]) == pytest.approx((60 + 100 + 0) / 3)
    assert scores.rouge_l(["b a"], ["a b"]) == pytest.approx(50)  # a subsequence, not a bag of words


def test_rouge_l_reads_german_and_chinese() -> None:
    assert scores.words("Die Ärzte heißen Jörg!") == ["die", "ärzte", "heissen", "jörg"]
    assert scores.words("fu\u0308r") == ["für"]
    assert scores.words("我在2023年爱GPT,カレー") == [*"我在", "2023", *"年爱", "gpt", *"カレー"]
    # "für" and "über" are words of one piece: 2 of 3 words are common.
    assert scores.rouge_l(["für über Öl"], ["Für Über Gas"]) == pytest.approx(200 / 3)
    # 我 爱 猫 are common: P = 3/4, R = 3/3.
    assert scores.rouge_l(["我很爱猫"], ["我爱猫。"]) == pytest.approx(600 / 7)


def test_edit_similarity_by_hand() -> None:
    # "abcd" to "abxd": c out, x in; 2 of 8 characters.
    assert scores.edit_similarity(["abcd"], ["abxd"]) == pytest.approx(75)
    assert scores.edit_similarity(["abcd", "abc", "x"], ["abxd", "abc", "y"]) == pytest.approx((75 + 100 + 0) / 3)
    # 2 of 3 characters: not rounded to 67.
    assert scores.edit_similarity(["ab"], ["a"]) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("placeholder", "code"),
    [
        ("x = <NUM_LIT:1> + <NUM_LIT:25>", "x = 1 + 25"),
        ("f ( \"<STR_LIT:abc>\" , '<STR_LIT:utf-8>' )", "f ( \"abc\" , 'utf-8' )"),
        ("'<CHAR_LIT:a>'", "'a'"),
        ("x = <NUM_LIT> , \"<STR_LIT>\" , '<CHAR_LIT>'", "x = 0 , \"\" , ''"),
        ("'<STR_LIT:->>' , '<STR_LIT:<a>>'", "'->' , '<a>'"),
        (r"'<STR_LIT:\n>'", r"'\n'"),
        ("<s> return x </s>", "return x"),
        ("return x <EOL>", "return x"),
        ("\n <EOL> return x <EOL> y = <NUM_LIT:2>", "return x"),
        ("return x\ny = 2", "return x"),
        (" return x\r\ny", "return x"),
    ],
)
def test_py150_placeholders_and_later_lines_do_not_count(placeholder: str, code: str) -> None:
    assert scores.edit_similarity([placeholder], [code]) == 100
    assert scores.edit_similarity([code], [placeholder]) == 100
    assert scores.edit_similarity([code + "x"], [placeholder]) < 100


def sari_of(source: str, prediction: str, *references: str) -> float:
    return scores.sari([source], [prediction], [references])


def test_sari_by_hand() -> None:
    # n:        1                      2                3            4
    # kept      {a b}, right {a}       {ab}, right {}   {}           {}
    # to keep   {a c}                  {}               {}           {}
    keep = [1 / 2, 0, 1, 1]  # P, R = 1/2, 1/2; 0, 0/0; 0/0, 0/0; 0/0, 0/0
    # new       {x}, right {x}         {bx}, right {}   {abx}        {}
    # to add    {x y}                  {ac cx xy}       {acx cxy}    {acxy}
    add = [2 / 3, 0, 0, 0]  # P, R = 1, 1/2; 0, 0; 0, 0; 0/0, 0
    # deleted   {c d}, right {d}       {bc cd}, both    {abc bcd}    {abcd}
    delete = [1 / 2, 1, 1, 1]
    expected = 100 / 3 * (sum(keep) + sum(add) + sum(delete)) / 4
    assert expected == pytest.approx(500 / 9)
    assert sari_of("a b c d", "a b x", "a c x y") == pytest.approx(expected)
    assert scores.sari(["a b c d", "p"], ["a b x", "q"], ["a c x y", ["q"]]) == pytest.approx((expected + 100) / 2)


def test_sari_of_a_prediction_that_copies_its_source() -> None:
    # Kept: 3 of 4 rightly, 1 of 3, none of 2, none of 1, and nothing is missed. What to add is all missed.
    keep = [6 / 7, 1 / 2, 0, 0]
    assert sari_of("a b c d", "a b c d", "a b x d") == pytest.approx(100 / 12 * (sum(keep) + 0 + 4))


def test_sari_of_a_perfect_prediction() -> None:
    assert sari_of("a b c d e f", "a c x d y", "a c x d y") == 100
    assert sari_of("a b c d", "a b c d", "a b c d") == 100
    # Of two "a" deleted, one is in the reference still: 1/2 for n = 1, as the package `evaluate` counts.
    assert sari_of("a a a", "a", "a") == pytest.approx(100 / 12 * 11.5)


def test_sari_counts_how_often_a_word_is_to_be_kept() -> None:
    # n = 1: kept {b}, rightly; to keep {a a a b}: P = 1, R = 1/4. Longer: nothing kept of what was to be.
    # Nothing is to be added, nothing was; everything deleted is wrong.
    assert sari_of("a a a b", "b", "a a a b") == pytest.approx(100 / 12 * (2 / 5 + 4 + 0))


def test_sari_weighs_several_references() -> None:
    # n = 1: "a" kept and "b" to be deleted are right by one reference of two, each; "c" is added rightly.
    # n = 2: "ac" is added wrongly, "bc" is missing, "ab" is deleted rightly. Longer: 0/0.
    keep, add, delete = [1 / 2, 1, 1, 1], [1, 0, 1, 1], [1 / 2, 1, 1, 1]
    expected = 100 / 12 * (sum(keep) + sum(add) + sum(delete))
    assert sari_of("a b", "a c", "a", "b c") == pytest.approx(expected)
    assert sari_of("a b", "a c", "b c", "a") == pytest.approx(expected)


def test_sari_of_the_example_of_the_package_evaluate() -> None:
    # Its documentation gives 26.9536; the full stop, a word to its tokenizer and none to ours, is written out.
    source = "About 95 species are currently accepted stop"
    references = (
        "About 95 species are currently known stop",
        "About 95 species are now accepted stop",
        "95 species are now accepted stop",
    )
    assert sari_of(source, "About 95 you now get in stop", *references) == pytest.approx(26.953601953601954)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("empty", ["", " \n\t"])
@pytest.mark.parametrize("reference", ["", "ab"])
def test_an_empty_prediction_scores_0_and_stays_in_the_denominator(name: str, empty: str, reference: str) -> None:
    assert of(name, [("ab", empty, reference)]) == 0
    assert of(name, [("ab", "ab", "ab"), ("ab", empty, reference)]) == 50


@pytest.mark.parametrize("name", SCORES)
def test_lists_that_do_not_fit_are_refused(name: str) -> None:
    score = SCORES[name]
    sources = [["a", "b"]] if score.needs_sources else []
    with pytest.raises(ValueError, match="2 predictions, 1 references: give one of each for every example"):
        score.function(*sources, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="predictions is a single text: put it in a list"):
        score.function(*sources, "ab", ["a", "b"])
    with pytest.raises(ValueError, match="there are no examples to score: give at least one"):
        score.function(*[[] for _ in sources], [], [])


def test_sari_refuses_missing_sources_and_references() -> None:
    with pytest.raises(ValueError, match="got 1 sources, 2 predictions, 2 references"):
        scores.sari(["a"], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="an example has no reference: give each at least one"):
        scores.sari(["a"], ["a"], [[]])


@pytest.mark.parametrize("name", SCORES)
@given(rows=lists(texts, 3) | lists(full_texts, 3))
def test_every_score_lies_between_0_and_100(name: str, rows: list[tuple[str, ...]]) -> None:
    assert 0 <= of(name, rows) <= 100


@pytest.mark.parametrize("name", PAIRED)
@given(rows=lists(full_texts, 2))
def test_a_perfect_prediction_scores_100(name: str, rows: list[tuple[str, ...]]) -> None:
    assert of(name, [(source, wanted, wanted) for source, wanted in rows]) == 100


@pytest.mark.parametrize("name", PAIRED)
@given(rows=lists(full_texts, 3))
def test_predictions_and_references_may_change_places(name: str, rows: list[tuple[str, ...]]) -> None:
    swapped = [(source, wanted, found) for source, found, wanted in rows]
    assert of(name, rows) == pytest.approx(of(name, swapped))


@pytest.mark.parametrize("name", SCORES)
@given(data=st.data(), rows=lists(texts, 3) | lists(full_texts, 3))
def test_the_order_of_the_examples_does_not_matter(name: str, data: st.DataObject, rows: list[tuple[str, ...]]) -> None:
    assert of(name, data.draw(st.permutations(rows))) == of(name, rows)


tokens = st.lists(st.sampled_from(["a", "b", "ö", "中"]), min_size=1, max_size=9)


@given(tokens, tokens)
def test_rouge_l_is_the_f1_of_a_plain_longest_common_subsequence(found: list[str], wanted: list[str]) -> None:
    @cache
    def common(i: int, j: int) -> int:
        if i == len(found) or j == len(wanted):
            return 0
        return max(common(i + 1, j), common(i, j + 1), (found[i] == wanted[j]) + common(i + 1, j + 1))

    precision, recall = common(0, 0) / len(found), common(0, 0) / len(wanted)
    [each] = scores.rouge_l_each([" ".join(found)], [" ".join(wanted)])
    f1 = 2 * precision * recall / (precision + recall) if precision else 0
    assert each == pytest.approx((precision, recall, f1))
    assert scores.rouge_l([" ".join(found)], [" ".join(wanted)]) == pytest.approx(100 * f1)


def test_importing_is_light_and_scoring_needs_no_network() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from treelora_ray.objectives import scores\n"
        "print(sorted({'rouge_score', 'nltk', 'torch'} & set(sys.modules)))\n"
        "print(scores.rouge_l(['ein Haus'], ['Ein Haus.']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n100.0\n"), done.stderr
