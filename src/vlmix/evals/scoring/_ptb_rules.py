"""The rules of Stanford's English tokenizer (CoreNLP 3.4.1, Penn Treebank style), as COCO runs it.

They were worked out from what the tokenizer does, and agree with it on a hundred thousand made-up captions.
Not known here: letters that Unicode got after 2014's tables, which it drops and this keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from vlmix.evals.scoring._ptb_words import (
    APOSTROPHE_WORDS,
    CLOSED_ABBREVIATIONS,
    FILE_ENDINGS,
    NUMBER_ABBREVIATIONS,
    OPEN_ABBREVIATIONS,
    SENTENCE_STARTS,
    TWO_IN_ONE,
)

_MARKS = (
    "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u036f\u0375\u0384\u0385\u03f6\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf"
    "\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ef\u06fd\u06fe\u070f\u0711\u0730-\u074c"
    "\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc-\u09c4"
    "\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc-\u0acf\u0b82"
    "\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a"
    "\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u1885\u1886"
)
_NUMERALS = (
    "\u00b2\u00b3\u00b9\u00bc-\u00be\u09f4-\u09f9\u0bf0-\u0bf2\u0f2a-\u0f33\u2070\u2074-\u2079\u2080-\u2089"
    "\u2150-\u2182\u2185-\u218b\u2460-\u24ff\u2776-\u2793\u3007\u3021-\u3029\u3038-\u303a\u3192-\u3195"
    "\u3220-\u3229\u3248-\u324f\u3251-\u325f\u3280-\u3289\u32b1-\u32bf"
)
_PLAIN = rf"(?:(?![{_NUMERALS}])[^\W\d_\U00010000-\U0010ffff])"
_ALNUM = rf"(?:{_PLAIN}|\d)"
_LETTER = rf"(?:{_PLAIN}|[{_MARKS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
_LINE_END = r"(?:\r\n|[\r\n\u2028\u2029\x0b\x0c\x85])"
_GAP = rf"(?:{_SPACE}|{_LINE_END})"
_APOSTROPHE = r"(?:['\x92\u2019]|(?i:&apos;))"
_LOOSE_APOSTROPHE = rf"(?:{_APOSTROPHE}|[`\x91\u2018\u201b])"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_NOT = rf"(?i:n){_LOOSE_APOSTROPHE}(?i:t)"
_NUMBER = r"\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+(?:[.:,\u00ad\u066b\u066c]\d+)*"
_TAG_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG_VALUE = rf"(?:'[^'\r\n]*'|\"[^\"\r\n]*\"|{_TAG_NAME})"
_TAG_FIELD = rf"[ ]+{_TAG_NAME}(?:[ ]*=[ ]*{_TAG_VALUE})?"
_TAG = rf"<(?:[!?][A-Za-z\-][^>\r\n]*|{_TAG_NAME}(?:{_TAG_FIELD})*[ ]*/?|/{_TAG_NAME})[ ]*>"
_ACRONYM = (
    r"(?:[A-Za-z](?:\.[A-Za-z])+|(?i:canada|sino|korean|eu|japan|non)-(?i:u\.s)"
    r"|(?i:u\.s\.-u\.(?:k|s\.s\.r)))"
)
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_ELISION = rf"(?:[dDoOlL]{_LOOSE_APOSTROPHE}{_ALNUM})?"
_PIECE = rf"{_ELISION}{_ALNUM}+"
_SYMBOLS = (
    r"+%&~^|\\\u00a6-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00ba\u00d7\u00f7\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
    r"\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f"
    r"\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u2100-\u214f"
    r"\u2190-\u2bff\u3001\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_QUOTES = r"`\u2018-\u201f\x91-\x94\u2039\u203a\u00ab\u00bb"
_FACE = r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]"
_EASTERN_FACES = (
    r"[\^x=~<>]\.\[\^x=~<>]",
    r"[\-\^x=~<>']_[\-\^x=~<>']",
    r"\([\-\^x=~<>'][_.]?[\-\^x=~<>']\)",
    r"\([\^x=~<>']-[\^x=~<>'`]\)",
)
_BEHIND_WORD = "[,;:\u3001]"
_CURRENCIES = {"\u00a2": "cents", "\u00a3": "#", **dict.fromkeys("\u00a4\x80\u20a0\u20ac", "$")}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTE_NAMES = (
    ("(?i:&apos;)", "'"),
    ("[\x91\u2018\u201b\u2039]", "`"),
    ("[\x92\u2019\u203a]", "'"),
    ("[\x93\u201c\u00ab]", "``"),
    ("[\x94\u201d\u00bb]", "''"),
)


class Rule(NamedTuple):
    """A token (group 1) and what must stand behind it; ``give`` says what becomes of the token.

    Its last ``back`` characters are read again, as the next token's.
    """

    pattern: re.Pattern[str]
    give: Callable[[str], str]
    back: int


def _same(token: str) -> str:
    return token


def _unhyphened(token: str) -> str:
    return token.replace("\u00ad", "") or "-"


def _unescaped(token: str) -> str:
    return re.sub("(?i)&amp;", "&", token)


def _glued(token: str) -> str:
    return token.replace(" ", "\u00a0").replace("(", "-lrb-").replace(")", "-rrb-")


def _dashes(token: str) -> str:
    return "--" if len(token) in {3, 4} else token


def _quotes(token: str) -> str:
    for old, new in _QUOTE_NAMES:
        token = re.sub(old, new, token)
    return token


def _named(names: dict[str, str]) -> Callable[[str], str]:
    return lambda token: names.get(token, token)


def _always(token: str) -> Callable[[str], str]:
    return lambda _: token


def _rule(token: str, then: str = "", give: Callable[[str], str] = _same, back: int = 0) -> Rule:
    return Rule(re.compile(rf"({token}){then}"), give, back)


def _words() -> list[Rule]:
    """Words, what is split off them, tags and entities."""
    halves = [_rule(f"(?i:{word})".replace("'", _APOSTROPHE), back=back) for word, back in TWO_IN_ONE.items()]
    whole = [
        word.replace("'", _APOSTROPHE).replace("~", _LOOSE_APOSTROPHE).replace("@", _PLAIN)
        for word in APOSTROPHE_WORDS
    ]
    return [
        _rule(r"(?i:c\+\+|[cf]\#)"),
        *halves,
        _rule(_TAG, give=lambda token: token.replace(" ", "\u00a0")),
        _rule("&(?i:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]", give=_always("--")),
        _rule("(?i:&amp;)", give=_always("&")),
        _rule("&(?:(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq)|#[0-9]+);"),
        _rule(_WORD, _CLITIC, _unhyphened),
        _rule("[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", _NOT, _unhyphened),
        _rule(_WORD, give=_unhyphened),
        *(_rule(word) for word in whole),
        _rule(f"(?i:y){_APOSTROPHE}", _PLAIN),
    ]


def _addresses() -> list[Rule]:
    """Addresses of the web and of people, and clitics."""
    path = r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},\-])?"
    return [
        _rule(r"(?i:https?)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},\-]"),
        _rule(rf"(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path}"),
        _rule(rf"(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu){path}"),
        _rule(
            r"(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\u00a0]+\.)*"
            r"[^ \t\n\f\r\"<>|(){}.\u00a0]+(?:>|(?i:&gt;))?"
        ),
        _rule("@[a-zA-Z_][a-zA-Z_0-9]*"),
        _rule(rf"\#{_LETTER}+"),
        _rule(_CLITIC, "[^A-Za-z]", _quotes),
        _rule(_NOT, "[^A-Za-z]", _quotes),
    ]


def _numbers() -> list[Rule]:
    """Numbers, dates, fractions, money, and a few words that a number or a dash belongs to."""
    compound = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    return [
        _rule(r"\d{1,2}[\-/]\d{1,2}[\-/]\d{2,4}"),
        _rule(rf"[\-+]?(?:{_NUMBER})", give=_unhyphened),
        _rule("[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
        _rule(r"(?:\d{1,4}[\- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", give=_glued),
        _rule("[\u00bc-\u00be\u2153-\u215e]", give=_named(_FRACTIONS)),
        _rule(r"-(?i:[lr][rcs]b)-|(?i:C\.D\.s|pro-|anti-|S&P-500|S&Ls)"),
        _rule("(?i:S&amp;P-500|S&amp;Ls)", give=_unescaped),
        _rule(rf"{compound}(?:\\?/{compound}){{1,2}}"),
        _rule(r"[A-Z]*\$|\#"),
        _rule(
            "[\u00a2-\u00a5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]",
            give=_named(_CURRENCIES),
        ),
    ]


def _abbreviations() -> list[Rule]:
    """What keeps its dot. Behind an acronym a sentence may end; a single letter gives its dot up to it."""
    starts = rf"{_GAP}+(?:{SENTENCE_STARTS}|{_TAG}){_GAP}"
    dotted = [
        rule
        for word in (OPEN_ABBREVIATIONS, _ACRONYM, "[A-Za-z]")
        for rule in (_rule(rf"{word}\."), _rule(word, _SPACE), _rule(word, _GAP))
    ]
    return [
        _rule(r"[A-Za-z]\.", starts, back=1),
        _rule(rf"{_ACRONYM}\.", starts),
        _rule(rf"{NUMBER_ABBREVIATIONS}\.", rf"{_GAP}?\d"),
        _rule(rf"{CLOSED_ABBREVIATIONS}\.", r"(?s:..)?"),
        *dotted,
        _rule(f"{_APOSTROPHE}[0-9][0-9]", _GAP),
        _rule(rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.{FILE_ENDINGS}", rf"(?:{_GAP}|[.?!,])"),
        _rule(rf"{_WORD}\.", _BEHIND_WORD, _unhyphened),
    ]


def _marks() -> list[Rule]:
    """Telephone numbers, faces, brackets, dashes and dots."""
    middle = r"[0-9]{3,4}[\- \u00a0]?[0-9]{3,5}"
    return [
        _rule(rf"\([0-9]{{2,3}}\)[ \u00a0]?{middle}", give=_glued),
        _rule(rf"(?:\+\+?)?(?:[0-9]{{2,4}}[\- \u00a0])?[0-9]{{2,4}}[\- \u00a0]{middle}", give=_glued),
        _rule(r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}", give=_glued),
        _rule('"|(?i:&quot;)', "[A-Za-z0-9$]?", _always("''")),
        _rule("<|(?i:&lt;)", give=_always("<")),
        _rule(">|(?i:&gt;)", give=_always(">")),
        _rule(_FACE, "[^A-Za-z0-9]", _glued),
        *(_rule(face, give=_glued) for face in _EASTERN_FACES),
        _rule(r"[()\[\]{}]", give=_named(_BRACKETS)),
        _rule("-+", give=_dashes),
        _rule("\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|[\x85\u2026]", give=_always("...")),
        _rule(r"@+|\#+|_+|\*+|(?:\\\*){1,3}|[?!]+|[,;:\u3001=/]"),
        _rule("[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]"),
    ]


def _compounds() -> list[Rule]:
    """Words with hyphens, quotation marks, lone symbols, and white space."""
    parts = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
    thing = rf"{_PIECE}(?:{_HYPHEN}{_PIECE})*"
    joined = r"[A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+"
    return [
        _rule(rf"{parts}\.", _BEHIND_WORD, _unhyphened),
        _rule(parts, give=_unhyphened),
        _rule(rf"{thing}\.", _BEHIND_WORD, _quotes),
        _rule(thing, give=_quotes),
        _rule(rf"{joined}\.", _BEHIND_WORD, _unescaped),
        _rule(joined, give=_unescaped),
        _rule("'", "[A-Za-z][^ \t\n\r\u00a0]", _always("`")),
        _rule(_CLITIC, give=_quotes),
        _rule(_NOT, give=_quotes),
        _rule(rf"''|[{_QUOTES}]{{1,2}}|{_APOSTROPHE}", give=_quotes),
        _rule("<<|>>"),
        _rule(rf"[{_SYMBOLS}]"),
        _rule(rf"{_SPACE}+|(?i:&nbsp;)", give=_always("")),
        _rule(_LINE_END, give=_always("\n")),
    ]


RULES = (*_words(), *_addresses(), *_numbers(), *_abbreviations(), *_marks(), *_compounds())
"""In their order: of those that match, the one that reaches furthest wins, then the first."""
