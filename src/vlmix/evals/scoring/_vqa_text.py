"""How VQA scorers normalise text, and how they count annotators who agree: VQAEval's way and EvalAI's (M4C).

Both take punctuation away by the same odd rule, write numbers up to ten in digits, drop articles and put
apostrophes back into contractions. They differ in what happens first and in what counts as a comma between
digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

MARKS: Final = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES: Final = frozenset({"a", "an", "the"})
DIGITS: Final = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_MOST_STOPS: Final = 32  # VQAEval hands a flag of `re`, whose number is 32, over as the count
_STOP: Final = re.compile(r"\.(?!\d)")
_ONE_COMMA: Final = re.compile(r"\d,\d")
_COMMAS: Final = re.compile(r"\d,+\d")

# Every word is also recognised without its apostrophe; those of two or three, without any one of them.
# "I'm" and "I've" are missing here: the originals list them with a capital, after lower-casing.
_WITH_ONE: Final = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've
"""
_WITH_MORE: Final = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _WITH_ONE.split()}
    for word in _WITH_MORE.split():
        places = [place for place, mark in enumerate(word) if mark == "'"]
        table.update({word[:place] + word[place + 1 :]: word for place in places})
    return {**table, "somebody'd": "somebodyd"}  # the wrong way round in every copy


CONTRACTIONS: Final[Mapping[str, str]] = _contractions()


def one_line(text: str) -> str:
    """Line feeds and tabs as blanks, no blanks at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str, comma: re.Pattern[str]) -> str:
    """Drop a mark that stands beside a blank anywhere in the text, else put a blank in its place.

    A comma between two digits makes every mark of the text vanish without a blank. Of full stops not before
    a digit, only the first 32 go.
    """
    glued = comma.search(text) is not None
    cleaned = text
    for mark in MARKS:
        alone = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if glued or alone else " ")
    return _STOP.sub("", cleaned, count=_MOST_STOPS)


def plain_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower case, numbers up to ten in digits, no articles, contractions with their apostrophes."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def vqaeval_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """VQAEval's normal form of a text that is one line already."""
    return plain_words(_without_marks(text, _ONE_COMMA), contractions)


def evalai_words(text: str) -> str:
    """The second half of EvalAI's processor, which lmms-eval uses alone for VQAv2: several commas are one."""
    return plain_words(_without_marks(text, _COMMAS))


def evalai(text: str) -> str:
    """EvalAI's processor of answers (M4C): first commas and question marks go and ``'s`` is split off."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return evalai_words(one_line(text))


def agreement(answer: str, golds: Sequence[str], *, alike_leave_together: bool = False) -> float | None:
    """The mean over annotators of min(1, others who gave this answer / 3); None where there is no annotator.

    ``alike_leave_together``: whoever is put aside takes along all who said the same, which is what comparing
    annotators by their words alone comes to.
    """
    if not golds:
        return None
    agreed = sum(gold == answer for gold in golds)
    others = 0 if alike_leave_together else agreed - 1
    return sum(min(1.0, (others if gold == answer else agreed) / 3) for gold in golds) / len(golds)
