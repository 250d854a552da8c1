"""Branches of the rules for letters, yes and no, true and false that the official files do not reach."""

import random

import pytest

from vlmix.core.errors import InputError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Row

FOUR = {"A": "cat", "B": "dog", "C": "red bus", "D": "two dogs"}


def judged(name, protocol, answer, gold, **fields):
    return SCORERS.get(name)().judge([Row("validation_Math_1", gold, answer, fields)], protocol)[0]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("the answer is clear to all who look at it", "C"),  # a letter that begins a word
        ("I take B as it fits very well here", ""),  # not among the last four words
        ("I take B as it fits", "B"),
        ("It is A CAT", "A"),
        ("the cat and the dog", ""),
        ("red bus", "C"),
        ("I can't process this file. B", "Z"),
        ("Failed to obtain answer via API: dog", "B"),  # the text is still looked for
        ("cat " * 11, ""),  # longer than twice all options
    ],
)
def test_vlmevalkit_reads_letters_and_texts(answer, letter):
    assert judged("mmbench", "vlmevalkit_vanilla_exact", answer, "A", index=1, **FOUR).parsed == letter
    found = judged("ai2d", "vlmevalkit_exact", answer, 2, options=list(FOUR.values()))
    assert (found.parsed, found.value) == (letter, float(letter == "C"))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("the answer is:B; Deer bark", "D"),  # the last letter behind the phrase
        ("It is a fish, see C. or D)", "C"),
        ("Both B: and C: hold, fish", "C"),
        ("答案是B", "B"),
        ("ABCD of fish", "D"),
        ("'B'", "B"),
        ("...", ""),
    ],
)
def test_lmms_eval_picks_the_surest_form(answer, letter):
    assert judged("mmbench", "lmms_eval_static", answer, "A", index=1, **FOUR).parsed == letter


@pytest.mark.parametrize("protocol", ["vlmevalkit_circular_exact", "lmms_eval_static"])
def test_a_group_of_rotations_needs_its_first_question(protocol):
    def row(index, answer):
        return Row(str(index), "A", answer, {"index": index, "split": "dev", "category": "x", **FOUR})

    rows = [row(1, "A"), row(1_000_001, "A"), row(2, "A"), row(1_000_002, None), row(2_000_003, "A")]
    scorer = SCORERS.get("mmbench")()
    found = scorer.judge(rows, protocol)
    assert [each.value for each in found] == [1, 1, 0, 0, None]
    summary = scorer.summarise(rows, found, protocol)
    assert 0.5 in {summary.get("overall_acc"), summary.get("dev", {}).get("Overall")}


@pytest.mark.parametrize(
    ("answer", "value"), [("b", 1), (" (B) ", 1), ("B. dog", 1), ("b. dog", 0), ("B dog", 0), ("B .", 0)]
)
def test_ai2d_takes_a_leading_capital_or_the_letter_without_punctuation(answer, value):
    for gold in (1, "1", "B"):
        assert judged("ai2d", "lmms_eval", answer, gold, options=["cat", "dog"]).value == value
    with pytest.raises(InputError, match="gold"):
        judged("ai2d", "lmms_eval", answer, "dog", options=["cat", "dog"])


def test_mmmu_draws_in_the_order_of_the_rows():
    fields = {"question_type": "multiple-choice", "index2ans": FOUR}
    rows = [Row(str(n), "A", "B" if n == 1 else "none", fields) for n in range(4)]
    scorer, draws = SCORERS.get("mmmu")(), random.Random(42)
    found = scorer.judge(rows, "mmmu_official")
    assert [each.state for each in found] == ["guessed", "read", "guessed", "guessed"]
    assert [found[n].parsed for n in (0, 2, 3)] == [draws.choice(list(FOUR)) for _ in range(3)]
    unknown = scorer.judge(rows, "lmms_eval")
    assert [(each.state, each.value) for each in unknown[:2]] == [("guessed", None), ("read", 0.0)]
    assert judged("mmmu", "lmms_eval", "BETA is it", "A", **fields).value == 1
    with pytest.raises(InputError, match="index2ans"):
        judged("mmmu", "mmmu_official", "A", "A", question_type="multiple-choice")


def test_mme_skips_what_would_not_be_a_line_of_its_table():
    answers = ["Yes", "No", "Yes", "No\tyes", "Yes", None]
    rows = [
        Row(str(n), "No" if n % 2 else "Yes", answer, {"category": "count", "image": str(n // 2)})
        for n, answer in enumerate(answers)
    ]
    scorer = SCORERS.get("mme")()
    found = scorer.judge(rows, "mme_eval_tool")
    assert [each.value for each in found] == [1, 1, 1, None, 1, None]
    assert scorer.summarise(rows, found, "mme_eval_tool")["Perception"]["count"] == pytest.approx(
        100 + 100 / 3
    )
    assert [each.value for each in scorer.judge(rows, "lmms_eval")] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("fields", "answer", "gold", "values"),
    [
        ({"answer_type": "text", "question_type": "free_form"}, "x", "x", (None, None, 1, 1)),
        ({"answer_type": "text", "question_type": "multi_choice"}, "A", "A", (None, None, None, None)),
        ({"answer_type": "float", "question_type": "free_form"}, "2.6", "3", (0, 0, 1, 1)),
        ({"answer_type": "integer", "question_type": "free_form"}, "inf", "None", (0, 0, 0, 1)),
        ({"answer_type": "list", "question_type": "free_form"}, " [1] ", "[1]", (0, 0, 0, 1)),
        (
            {"answer_type": "text", "question_type": "multi_choice", "choices": ["b", "no"]},
            " ",
            "b",
            (1, 0, 1, 1),
        ),
    ],
)
def test_mathvista_has_no_value_where_its_function_fails(fields, answer, gold, values):
    found = [judged("mathvista", name, answer, gold, **fields) for name in SCORERS.get("mathvista").protocols]
    assert tuple(each.value for each in found) == values


def test_nlvr_answers_end_at_a_comma():
    for answer, value in (("true, it is", 1), ("True ,", 0), ("\ntrue", 0), ("true\n", 1)):
        assert judged("nlvr", "nlvr1_metrics_images", answer, "true", example="1-0").value == value
