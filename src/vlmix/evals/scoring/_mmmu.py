"""How MMMU's scorers read an answer: a letter from free text, and all that an open answer may mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

_ENDS: Final = (",", ".", "!", "?", ";", ":", "'")
_LONG: Final = 5
_CLAIMS: Final = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL: Final = frozenset(":,.!?;'")
_NUMBERS: Final = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def letter_of(answer: str, options: Mapping[str, str], *, glued: bool) -> str:
    """The letter of the option that is mentioned last, or empty text.

    Letters in round brackets count before letters between blanks, and these before texts of options, which
    are only looked for in more than five words. With ``glued``, as lmms-eval has it, a letter needs a blank
    or else a full stop behind it and nothing before it, so that a word may end in it; where several do, the
    one that also has a blank before it is the last.
    """
    for mark in _ENDS:
        answer = answer.strip(mark)
    text = f" {answer} "
    spaced = " {} ".format
    forms = [("({})".format, "({})".format), ("{} ".format if glued else spaced, spaced)]
    if glued:
        forms.append(("{}.".format, spaced))
    for form, place in forms:
        found = [letter for letter in options if form(letter) in text]
        if found:
            return _last(text, found, place)
    if len(text.split()) <= _LONG:
        return ""
    lowered = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lowered]
    return _last(lowered, found, lambda letter: options[letter].lower()) if found else ""


def _last(text: str, letters: Sequence[str], form: Callable[[str], str]) -> str:
    return max(letters, key=lambda letter: text.rfind(form(letter)))


def meanings(answer: str) -> list[str | float]:
    """What an open answer may mean: the tails of its claims, or all of it, and every number in those."""
    claims = _claims(answer.strip().strip(".").lower())
    numbers = [number for claim in claims for pattern in _NUMBERS for number in pattern.findall(claim)]
    normal = [each for text in [*claims, *numbers] for each in normalised(text)]
    return list(dict.fromkeys(normal))


def _claims(answer: str) -> list[str]:
    """The shortest tail behind a word of conclusion in each line; in the last line also behind ``=``."""
    lines = answer.split("\n")
    found = list[str]()
    for number, line in enumerate(lines, 1):
        shortest = ""
        for word in (*_CLAIMS, "=") if number == len(lines) else _CLAIMS:
            tail = line.rpartition(word)[2].strip() if word in line else ""
            if word in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [answer]


def normalised(text: str) -> list[str | float]:
    """A number with two decimals, or lower case; a single character with a blank before and behind it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def open_answer_is_right(said: Sequence[str | float], golds: Sequence[str]) -> bool:
    """Whether a gold text is part of one that was said, or a gold number one of the numbers."""
    wanted = [each for gold in golds for each in normalised(gold)]
    texts = [each for each in wanted if isinstance(each, str)]
    return any(
        any(text in each for text in texts) if isinstance(each, str) else each in wanted for each in said
    )
