"""Caption words and metrics against what PyPI's pycocoevalcap, with its Java tokenizer, gave."""

import json
from pathlib import Path

import pytest

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Row
from vlmix.evals.scoring._captions import BLEU, Captioned, bleu, cider, rouge_l
from vlmix.evals.scoring._ptb import tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/captions.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.parity


def test_captions_have_the_words_that_the_java_tokenizer_gives():
    found = tokenize(GOLDEN["captions"])
    wrong = [
        triple
        for triple in zip(GOLDEN["captions"], GOLDEN["words"], found, strict=True)
        if triple[1] != triple[2]
    ]
    assert not wrong


@pytest.mark.parametrize("case", GOLDEN["sets"], ids=lambda case: f"{len(case['answers'])} pictures")
def test_metrics_are_those_of_the_package(case):
    pictures = [Captioned(*pair) for pair in zip(case["answers"], case["references"], strict=True)]
    each, whole = bleu(pictures)
    assert [whole[name] for name in BLEU] == pytest.approx(case["Bleu"], abs=1e-9)
    for scores, wanted in zip(each, case["each_Bleu"], strict=True):
        assert [scores[name] for name in BLEU] == pytest.approx(wanted, abs=1e-9)
    assert [rouge_l(picture) for picture in pictures] == pytest.approx(case["each_ROUGE_L"], abs=1e-9)
    assert cider(pictures) == pytest.approx(case["each_CIDEr"], abs=1e-9)


def test_the_next_caption_has_a_say_in_a_lone_letter_and_in_an_abbreviation_before_a_number():
    assert tokenize(["gate B.", "The man"])[0] == "gate b"
    assert tokenize(["gate B.", "a man"])[0] == "gate b."
    assert tokenize(["bus no.", "5 is red"])[0] == "bus no."
    assert tokenize(["bus no.", "five"])[0] == "bus no"


def test_line_ends_in_a_caption_move_no_other():
    assert tokenize(["a\r\nb\u2028c\x0bd\n", "", "<a b='\n'> e"]) == ["a b c d", "", "<a\u00a0b='\u00a0'> e"]


def test_domains_are_scored_as_sets_of_their_own():
    captions = [
        "a dog runs on grass",
        "a cat sleeps on a bed",
        "two men play chess outside",
        "a red bus stops",
    ]
    domains = ["in-domain", "in-domain", "out-domain", "out-domain"]
    rows = [
        Row(str(i), [text], captions[0], {"domain": domain})
        for i, (text, domain) in enumerate(zip(captions, domains, strict=True))
    ]
    scorer = SCORERS.get("nocaps")()
    summary = scorer.summarise(rows, scorer.judge(rows, "ptb"), "ptb")
    alone = scorer.judge(rows[:2], "ptb")
    assert set(summary) == {"entire", "in-domain", "out-domain"}
    assert summary["in-domain"]["CIDEr"] == pytest.approx(sum(each.value for each in alone) / 2)
    assert summary["in-domain"]["CIDEr"] != pytest.approx(summary["entire"]["CIDEr"])
