"""The words that COCO's caption metrics count: Stanford's tokens, lower-cased, without punctuation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vlmix.evals.scoring._ptb_rules import RULES
from vlmix.evals.scoring._ptb_words import CLOSED_ABBREVIATIONS, NUMBER_ABBREVIATIONS, OPEN_ABBREVIATIONS

_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
# Brackets stay: they are in lower case by now.
_INNER_LINE_END = re.compile(r"[\r\n\u2028\u2029\x0b\x0c]")
_DOTTED = rf"(?:{CLOSED_ABBREVIATIONS}|{OPEN_ABBREVIATIONS}|{NUMBER_ABBREVIATIONS}|[A-Za-z])\."
_EASY = re.compile(
    rf"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b|{_DOTTED})[A-Za-z]+(?=[ \n]|[.,](?:\n| [A-Za-z]))"
    r"|[.,](?=\n| [A-Za-z])| (?=[A-Za-z])"
)
"""What most of a caption is: whole words, blanks, and dots and commas behind words. It only saves time."""


def tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption's words, joined by blanks.

    All captions are read as one text, a line each, as COCO's script does it: what begins the next caption has
    a say in how the last word of this one is read (``plan b.``). Line ends inside a caption are blanks here;
    there, all but ``\\n`` move every caption behind them to the wrong picture.
    """
    lines = [line.rstrip().split(" ") for line in printed(captions)]
    return [" ".join(word for word in line if word not in _PUNCTUATION) for line in lines[: len(captions)]]


def printed(captions: Sequence[str]) -> list[str]:
    """The line that the tokenizer prints for each caption, punctuation and all."""
    lines: list[list[str]] = [[]]
    for token in _tokens("\n".join(_INNER_LINE_END.sub(" ", caption) for caption in captions)):
        if token == "\n":
            lines.append([])
        else:
            lines[-1].append(token.lower())
    return [" ".join(line) for line in lines]


def _tokens(text: str) -> Iterator[str]:
    """Every token, a line end as ``\\n``; what no rule knows is left out."""
    at = 0
    while at < len(text):
        if (easy := _EASY.match(text, at)) is not None:
            at = easy.end()
            if easy[0] != " ":
                yield easy[0]
            continue
        token, at = _longest(text, at)
        if token:
            yield token


def _longest(text: str, start: int) -> tuple[str, int]:
    """The token at ``start``, and where the next one begins."""
    reach, token, after = start, "", start + 1
    for rule in RULES:
        match = rule.pattern.match(text, start)
        if match is not None and match.end() > reach:
            reach, after = match.end(), match.end(1) - rule.back
            token = rule.give(text[start:after])
    return token, after
