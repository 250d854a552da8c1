"""What every scoring rule owes, run on each without naming any."""

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scored_rows import PERFECT, free_protocols, rows
from vlmix.core.errors import InputError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import State

ANSWERS = [
    "",
    " ",
    "\n",
    "\t",
    "A",
    "(B)",
    "yes",
    "No",
    "1e400",
    "nan",
    "inf",
    "\N{FULLWIDTH DIGIT ONE}",
    "1,0",
    "5%",
    "'s",
    "\0",
    "İ",
]
ANSWERS += ["The answer is A.", "é", "\N{GRINNING FACE}", "\ud83d", ".", "[", "\\", "-", "²", "½", "1" * 5000]
TEXTS = st.one_of(st.none(), st.sampled_from(ANSWERS), st.text(max_size=30))


# Stanford's tokenizer reads all captions as one text: what comes next decides on a full stop at the end.
IN_ORDER = {"ptb"}


def every_protocol():
    return [(name, protocol) for name in SCORERS.names() for protocol in free_protocols(name)]


def asked(name, protocol):
    scorer = SCORERS.get(name)
    assert name in PERFECT, f"give a few rows of {name} with perfect answers in tests/scored_rows.py"
    return scorer(), rows(name, scorer, protocol)


def figures(summary, above=""):
    for name, value in summary.items():
        if isinstance(value, dict):
            yield from figures(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def unit(name, units):
    while name not in units and "." in name:
        name = name.rpartition(".")[0]
    return units.get(name)


def test_the_page_on_scoring_names_every_rule_and_protocol():
    page = (Path(__file__).parents[2] / "docs/systems/scoring.md").read_text(encoding="utf-8")
    for name in SCORERS.names():
        assert f"`{name}`" in page
        assert all(f"`{protocol}`" in page for protocol in SCORERS.get(name).protocols)


@pytest.mark.parametrize("name", SCORERS.names())
def test_a_scorer_names_its_protocols_its_fields_and_its_rule(name):
    scorer = SCORERS.get(name)
    assert scorer.__doc__
    assert SCORERS.summary(name)
    assert scorer.official() in scorer.protocols
    for protocol in scorer.protocols.values():
        assert protocol.source
        assert protocol.full > 0
    assert not {"gold", "answer", "id", "score", "scores", "parsed"} & {*scorer.fields, *scorer.optional}
    assert not set(scorer.fields) & set(scorer.optional)


@pytest.mark.parametrize(("name", "protocol"), every_protocol())
def test_perfect_answers_get_full_marks(name, protocol):
    scorer, some = asked(name, protocol)
    found = scorer.judge(some, protocol)
    full = scorer.protocols[protocol].full
    assert all(each.value is not None for each in found)
    marks = [each.value for each in found]
    assert max(marks) == pytest.approx(full)
    if protocol == scorer.official():
        assert marks == pytest.approx([full] * len(marks))
    for figure, value in figures(scorer.summarise(some, found, protocol)):
        if unit(figure, scorer.units) is None:
            assert 0 <= value <= 1, f"{figure} is no share of 1: name its unit"


@pytest.mark.parametrize(("name", "protocol"), every_protocol())
def test_no_answer_is_worth_nothing_and_an_empty_one_no_more_than_a_guess(name, protocol):
    scorer, some = asked(name, protocol)
    missing = scorer.judge([replace(row, answer=None) for row in some], protocol)
    assert all(each.state == "missing" and not each.value for each in missing)
    scorer.summarise([replace(row, answer=None) for row in some], missing, protocol)
    empty = [each.value or 0.0 for each in scorer.judge([replace(row, answer="") for row in some], protocol)]
    assert sum(empty) < len(empty) * scorer.protocols[protocol].full


@pytest.mark.parametrize(("name", "protocol"), every_protocol())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_answers_score_within_bounds_and_the_aggregates_forget_their_order(name, protocol, data):
    scorer, some = asked(name, protocol)
    given_rows = [replace(row, answer=data.draw(TEXTS)) for row in some]
    found = scorer.judge(given_rows, protocol)
    assert len(found) == len(given_rows)
    most = scorer.protocols[protocol].full * (1 + 1e-9)  # CIDEr is a sum of rounded cosines
    for row, each in zip(given_rows, found, strict=True):
        assert each.value is None or 0 <= each.value <= most
        assert each.state in get_args(State)
        assert (each.state == "missing") == (row.answer is None)
    assert [each.value for each in scorer.judge(given_rows, protocol)] == [each.value for each in found]
    summary = dict(figures(scorer.summarise(given_rows, found, protocol)))
    assert all(value >= 0 for value in summary.values())
    if protocol in IN_ORDER or any(each.state == "guessed" for each in found):
        return  # a guess is drawn in the order of the rows
    turned = random.Random(0).sample(given_rows, len(given_rows))
    again = scorer.summarise(turned, scorer.judge(turned, protocol), protocol)
    assert dict(figures(again)) == pytest.approx(summary, abs=1e-9)  # sums in another order


@pytest.mark.parametrize(("name", "protocol"), every_protocol())
def test_no_rows_give_no_judgements(name, protocol):
    assert SCORERS.get(name)().judge([], protocol) == []


@pytest.mark.parametrize("name", SCORERS.names())
def test_a_protocol_that_needs_a_judge_says_so_and_what_to_do_without(name):
    free = free_protocols(name)
    assert free, f"{name} has no protocol that does without a judge"
    for protocol in set(SCORERS.get(name).protocols) - set(free):
        with pytest.raises(InputError, match=f"{protocol}.*judg.*{free[0]}"):
            SCORERS.get(name)().judge(rows(name, SCORERS.get(name), protocol), protocol)
