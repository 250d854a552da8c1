"""Aggregates and odd corners of the VQA-like scoring rules, worked out by hand from the official scripts."""

import pytest

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Row


def values(name, protocol, gold, *answers, **fields):
    rows = [Row(str(number), gold, answer, fields) for number, answer in enumerate(answers)]
    return [each.value for each in SCORERS.get(name)().judge(rows, protocol)]


def summary(name, protocol, rows):
    scorer = SCORERS.get(name)()
    return scorer.summarise(rows, scorer.judge(rows, protocol), protocol)


def test_vqaeval_normalises_only_where_annotators_differ():
    same, differing = ["a cat"] * 10, ["a cat"] * 9 + ["A cat."]
    assert values("vqav2", "vqaeval_official", same, "a cat", "A cat", "cat") == [100, 0, 0]
    assert values("vqav2", "vqaeval_official", differing, "a cat", "A cat", "cat") == [100] * 3
    assert values("vqav2", "llava_convert_then_vqaeval", same, "a cat", None) == [0, 0]
    assert values("vqav2", "vqaeval_official", [], "cat", None) == [None, None]
    stops = "." * 32 + "yes"
    assert values("vqav2", "vqaeval_official", ["yes"] * 5 + ["no"] * 5, stops, "." + stops) == [100, 0]


def test_annotators_without_numbers_leave_together():
    gold = ["red"] * 3 + ["blue"] * 2
    assert values("vqav2", "vqaeval_official", gold, "red", "blue") == [80.0, 53.33]
    assert values("vqav2", "vqaeval_official", gold, "red", "blue", gold_has_answer_id=False) == [40.0, 40.0]


def test_vqav2_is_told_by_type_from_unrounded_shares():
    gold = ["tea"] * 2 + ["coffee"] * 3
    rows = [
        Row("1", gold, "tea", {"answer_type": "other", "question_type": "what"}),
        Row("2", gold, "coffee", {"answer_type": "other", "question_type": "which"}),
        Row("3", gold, None, {"answer_type": "number", "question_type": "which"}),
    ]
    assert summary("vqav2", "vqaeval_official", rows) == {
        "overall_percent": 66.67,
        "perQuestionType_percent": {"what": 53.33, "which": 80.0},
        "perAnswerType_percent": {"other": 66.67},
    }
    assert summary("vqav2", "llava_convert_then_vqaeval", rows)["perAnswerType_percent"]["number"] == 0
    assert summary("vqav2", "lmms_eval", rows)["exact_match"] == pytest.approx(2 / 3)


def test_vizwiz_never_normalises_the_annotators():
    assert values("vizwiz", "vizwiz_api", ["a can"] * 10, "a can", "can") == [0, 0]
    assert values("vizwiz", "vizwiz_api", ["can"] * 10, "a can", "Can.", None) == [100, 100, None]
    assert values("vizwiz", "vizwiz_api", ["don't"] * 10, "don't", "dont") == [100, 0]
    assert values("vizwiz", "vizwiz_api", ["don\N{RIGHT SINGLE QUOTATION MARK}t"] * 10, "dont") == [100]
    assert values("vizwiz", "vizwiz_api", ["we've"] * 10, "weve") == [100]
    assert values("vizwiz", "llava_convert_then_vizwiz_api", ["dr pepper 's"] * 10, "Dr Pepper's") == [100]
    assert values("vizwiz", "lmms_eval", ["a can"] * 10, "A can!") == [1]


def test_unanswerable_questions_are_told_from_others():
    said = [("unanswerable", 0), ("Unanswerable.", 0), ("a can", 0), ("unanswerable", 1), ("a can", 1)]
    rows = [Row(str(i), ["x"] * 10, text, {"answerable": truth}) for i, (text, truth) in enumerate(said)]
    found = summary("vizwiz", "vizwiz_api", rows)["unanswerability"]
    # Two of three found, two of three right; the rest of the recall comes at the share of such questions.
    assert found == {"average_precision_percent": 64.44, "f1_score_percent": 66.67}


def gqa(number, gold, answer, balanced=True, kind="query", entailed=()):
    return Row(
        str(number),
        gold,
        answer,
        {
            "isBalanced": balanced,
            "question": "What is it?",
            "types": {
                "structural": kind,
                "semantic": "attr",
                "detailed": "twoCommon" if number == 2 else "attrQ",
            },
            "groups": {"global": "color"},
            "semantic": [
                {"operation": "select", "argument": "car"},
                {"operation": "query", "argument": "name"},
                {"operation": "exist", "argument": "?"},
            ],
            "entailed": list(entailed),
            "choices": {"valid": ["red", "blue"], "plausible": ["red"]},
        },
    )


def test_gqa_prints_what_its_script_prints():
    rows = [
        gqa(1, "red", "Red.", entailed=["1", "2", "3", "99"]),
        gqa(2, "blue", "color", kind="choose"),
        gqa(3, "red", "red", balanced=False),
        gqa(4, "red", "blue"),
    ]
    found = summary("gqa", "gqa_eval_after_llava_convert", rows)
    wanted = {
        "accuracy": 33.33,
        "binary": 0,
        "open": 50,
        "consistency": 50,
        "validity": 100,
        "plausibility": 66.67,
    }
    assert {name: found[f"{name}_percent"] for name in wanted} == wanted
    # Gold: red twice, blue once. Given: red once, blue once. ((1 - 2)^2 / 2 + 0) / 100.
    assert found["distribution"] == pytest.approx(0.0, abs=0.01)
    assert found["accuracyPerSteps_percent"] == {"1": 33.33}
    assert found["questionsPerLength"] == {"3": 3}
    assert summary("gqa", "lmms_eval", rows) == {"exact_match": 0.5}
    assert values("gqa", "gqa_eval_raw", "red", "red", "red ", "Red") == [1, 0, 0]
    assert values("gqa", "lmms_eval", "t-shirt", "tshirt", "t shirt", "T-SHIRT!") == [1, 0, 1]


def test_chartqa_is_told_by_who_asked():
    rows = [
        Row("1", "10", "10.5", {"type": "human_test"}),
        Row("2", "10", "10.6", {"type": "human_test"}),
        Row("3", ["x", "Y"], "y", {"type": "augmented_test"}),
        Row("4", "x", None, {"type": "augmented_test"}),
    ]
    assert summary("chartqa", "lmms_eval", rows) == pytest.approx(
        {"relaxed_overall": 2 / 3, "relaxed_human_split": 0.5, "relaxed_augmented_split": 1.0}
    )
    assert summary("chartqa", "pix2struct", rows)["relaxed_accuracy_percent"] == pytest.approx(200 / 3)


def test_textvqa_of_m4c_wants_ten_annotators():
    assert values("textvqa", "m4c_evaluator", ["1,299.99"] * 9, "1299.99") == [None]
    assert values("textvqa", "m4c_evaluator", ["1,299.99"] * 10, "1299.99", "") == [1, 0]
    assert values("textvqa", "lmms_eval", ["1,299.99"] * 9, "1299.99") == [1]
