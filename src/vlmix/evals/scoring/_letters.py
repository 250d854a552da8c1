"""How scorers find an option's letter in free text: LLaVA's way, VLMEvalKit's and lmms-eval's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

REFUSED: Final = "Z"
"""VLMEvalKit's letter for an answer that refuses, or names no option."""

_LLAVA_LETTERS: Final = ("A", "B", "C", "D", "E")
_LLAVA_ANSWER: Final = re.compile(r"The answer is ([A-Z]).")

_NO_REPLY: Final = "Failed to obtain answer via API"
_REFUSALS: Final = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS: Final = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS: Final = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST_WORDS: Final = 4

_LMMS_LETTERS: Final = "ABCDE"
_LMMS_WRAPPERS: Final = (
    "{}.",
    "{},",
    "{}:",
    "{})",
    "{}).",
    "({})",
    "({}).",
    ":{}",
    ":{},",
    ":{}.",
    ":{})",
    ":{}).",
)
_SENTENCE: Final = 3

_ENDS: Final = (",", ".", "!", "?", ";", ":", "'", '"')
_FORMATS: Final = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_AT_START, _AT_END, _AFTER_PHRASE, _ANYWHERE = 10, 9, 7, 0
_CLAIMS: Final = (
    "answer is",
    "correct answer is",
    "best answer is",
    "correct option is",
    "best option is",
    "choice is",
    "correct choice is",
)
_PHRASES: Final = (
    *_CLAIMS,
    *(f"the {claim}" for claim in _CLAIMS),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_ANY_LETTERS: Final = "ABCDEFGH"


class _Find(NamedTuple):
    """A letter found in a text: the surest form wins, then the last place."""

    rank: int
    place: int
    letter: str


def llava_letter(answer: str) -> str:
    """A to E alone or before a full stop and a blank, else the capital behind the only ``The answer is ``.

    That capital may begin a word (``The answer is Apple.`` is A), and a character other than a line break
    has to follow it, as the dot of the pattern is not escaped. Empty text if there is none.
    """
    if answer in _LLAVA_LETTERS:
        return answer
    if answer[:1] in _LLAVA_LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = _LLAVA_ANSWER.findall(answer)
    return found[0] if len(found) == 1 else ""


def vlmevalkit_letter(answer: str, options: Mapping[str, str]) -> str:
    """VLMEvalKit's reading without a judge: a letter, ``Z`` for a refusal, or empty text.

    The only letter among the words counts if it is one of the last four; else what follows the first
    ``answer is``, in any case and even if it begins a word (``answer is clear`` is C); else the only option
    whose text occurs, in an answer at most twice as long as all options together.
    """
    letter = _named(answer, options)
    if letter:
        return letter
    if len(answer.lower()) > 2 * sum(len(text) for text in options.values()):
        return ""
    return _only_text(answer, options)


def _named(answer: str, options: Mapping[str, str]) -> str:
    if _NO_REPLY in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    claim = _ANSWER_IS.search(answer)
    return claim[1].upper() if claim and claim[1].upper() in options else ""


def _only_text(answer: str, options: Mapping[str, str]) -> str:
    lowered = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else ""


def lmms_letter(answer: str, options: Mapping[str, str]) -> str:
    """lmms-eval's reading of MMBench without a judge: a letter from A to E or empty text.

    The only letter among the words, bare or in one of twelve sorts of brackets and stops (an ``A`` in more
    than three words passes for the article); else the only option whose text occurs; else `_surest`.
    """
    words = [] if _NO_REPLY in answer else answer.split()
    bare = [letter for letter in _LMMS_LETTERS if letter in words]
    if len(bare) == 1 and not (bare == ["A"] and len(words) > _SENTENCE):
        return bare[0]
    for wrapper in _LMMS_WRAPPERS:
        wrapped = [letter for letter in _LMMS_LETTERS if wrapper.format(letter) in words]
        if len(wrapped) == 1:
            return wrapped[0]
    return _only_text(answer, options) or _surest(answer, sorted(options) or list(_ANY_LETTERS))


def _surest(answer: str, letters: Sequence[str]) -> str:
    """The letter in the surest form, the last one of that form; at worst one that is part of a word."""
    text = answer.strip()
    for mark in _ENDS:
        text = text.strip(mark)
    padded = f" {text} "
    finds = [*_formatted(padded, letters), *_claimed(padded, letters), *_outermost(padded, letters)]
    finds = finds or [
        _Find(_ANYWHERE, padded.rfind(letter), letter) for letter in letters if letter in padded
    ]
    return max(finds).letter if finds else ""


def _formatted(text: str, letters: Sequence[str]) -> Iterator[_Find]:
    for form, rank in _FORMATS.items():
        for letter in letters:
            place = text.rfind(form.format(letter))
            if place >= 0:
                yield _Find(rank, place, letter)


def _claimed(text: str, letters: Sequence[str]) -> Iterator[_Find]:
    lowered = text.lower()
    for phrase in _PHRASES:
        start = lowered.find(phrase)
        for letter in letters if start >= 0 else ():
            place = text.find(letter, start + len(phrase))
            if place >= 0:
                yield _Find(_AFTER_PHRASE, place, letter)


def _outermost(text: str, letters: Sequence[str]) -> Iterator[_Find]:
    core = text.strip()
    for letter in letters:
        if core.startswith(letter) and not core[1:2].isalpha():
            yield _Find(_AT_START, 0, letter)
        if core.endswith(letter) and not core[-2:-1].isalpha():
            yield _Find(_AT_END, len(text), letter)
