"""A file of questions with their answers, scored by a benchmark's own rule; bad lines are kept count of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlmix.core.errors import InputError, UnknownNameError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Json, Judged, Row
from vlmix.core.scoring import Scorer, Summary
from vlmix.evals.judges.asking import Judge
from vlmix.evals.scoring._judged import JudgedScorer, judge_missing, unjudged, without_judge

_REASONS_SHOWN: Final = 3
_BOM: Final = b"\xef\xbb\xbf"
_NOT_JSON: Final = (ValueError, RecursionError)
_BROKEN: Final = (InputError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Malformed:
    """A row that cannot be scored; ``line`` is that of a JSONL file, or the row's number in any other."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Line:
    """A row that can be scored, where it stands, and its id as the file has it."""

    number: int
    id: Json
    row: Row


@dataclass(frozen=True, slots=True)
class Scored:
    """What a protocol makes of a file: ``judged`` belongs to ``lines``; malformed rows are in neither.

    ``full`` is what 1 would be in the protocol's unit, such as 100 where it is percent. ``note`` is what a
    reader has to know.
    """

    benchmark: str
    protocol: str
    source: str
    full: float
    lines: Sequence[Line]
    judged: Sequence[Judged]
    summary: Summary
    units: Mapping[str, str]
    malformed: Sequence[Malformed] = field(default_factory=list[Malformed])
    note: str = ""

    @property
    def total(self) -> int:
        """All rows of the file, malformed ones too: what the mean is over."""
        return len(self.lines) + len(self.malformed)

    @property
    def mean(self) -> float:
        """The mean over all rows; those without a value count 0."""
        return sum(each.value for each in self.judged if each.value is not None) / self.total

    def counts(self) -> dict[str, int]:
        """Rows in all; with and without a value; not read, guessed, missing, failed; malformed."""
        states = Counter(each.state for each in self.judged)
        scored = sum(each.value is not None for each in self.judged)
        return {
            "rows": self.total,
            "scored": scored,
            "unscored": len(self.judged) - scored,
            **{state: states[state] for state in ("unparsed", "guessed", "missing", "failed")},
            "malformed": len(self.malformed),
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, in the words of the file's own fields."""
        samples = [
            {"id": line.id, "score": each.value, "parsed": each.parsed, "state": each.state, **each.detail}
            for line, each in zip(self.lines, self.judged, strict=True)
        ]
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "source": self.source,
            **({"note": self.note} if self.note else {}),
            "n": self.total,
            "counts": self.counts(),
            "mean": self.mean,
            "full": self.full,
            "samples": samples,
            "summary": self.summary,
            "malformed": [{"line": bad.line, "reason": bad.reason} for bad in self.malformed],
        }


def score_file(
    benchmark: str,
    path: Path,
    protocol: str = "",
    *,
    judge: Judge | None = None,
    rules: Path | None = None,
) -> Scored:
    """Score the rows of ``path`` under ``protocol``, or under the official one.

    Where the official protocol needs a judge and there is none, the usual one is the first that needs none.
    ``rules`` is a file with the words to the judge.

    Raises:
        UnknownNameError: if there is no such benchmark or protocol.
        InputError: if the file cannot be read or has no row that can be scored, or if the judge has
            nothing to do or is missing.

    """
    scorer, usual, note = _opened(benchmark, protocol, judge, rules)
    protocol = protocol or usual
    lines, malformed = read_rows(path, type(scorer))
    lines, broken, judged, summary = _judge(scorer, lines, protocol)
    malformed = sorted([*malformed, *broken], key=lambda bad: bad.line)
    if not lines:
        why = "; ".join(f"line {bad.line}: {bad.reason}" for bad in malformed[:_REASONS_SHOWN])
        raise InputError(f"{path}: no row can be scored as {benchmark}. {why or 'The file is empty'}")
    rule = scorer.protocols[protocol]
    return Scored(
        benchmark, protocol, rule.source, rule.full, lines, judged, summary, scorer.units, malformed, note
    )


def _opened(
    benchmark: str, protocol: str, judge: Judge | None, rules: Path | None
) -> tuple[Scorer, str, str]:
    """The rule with its judge, the protocol to take if none is named, and what to know of the figures."""
    kind = SCORERS.get(benchmark)
    if protocol and protocol not in kind.protocols:
        raise UnknownNameError(f"protocol of {benchmark}", protocol, kind.protocols)
    marked = kind.marked if issubclass(kind, JudgedScorer) else frozenset[str]()
    if not issubclass(kind, JudgedScorer) or (protocol and protocol not in marked):
        if judge is not None or rules is not None:
            raise InputError(
                f"{benchmark} {protocol}".rstrip() + ": no judge has a part in it; leave --judge out"
            )
        return kind(), kind.official(), ""
    if judge is None and protocol:
        raise InputError(judge_missing(kind, protocol))
    if judge is None and rules is not None:
        raise InputError(f"{rules}: words to a judge, and there is none; name one with --judge")
    usual = unjudged(kind) if judge is None else kind.official()
    note = without_judge(kind, usual) if judge is None else ""
    return kind.asking(judge, rules), usual, note


def read_rows(path: Path, scorer: type[Scorer]) -> tuple[list[Line], list[Malformed]]:
    """The rows of a JSONL file, of a JSON list, or of an object's ``samples``; and what is no row.

    Parsing is as lenient as Python's, since that is what the official scripts read with.

    Raises:
        InputError: if the file cannot be read.

    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    lines: list[Line] = []
    malformed: list[Malformed] = []
    for number, raw in _parsed(content.removeprefix(_BOM)):
        if reason := _fault(raw, scorer):
            malformed.append(Malformed(number, reason))
        else:
            lines.append(_line(number, raw, scorer))
    return lines, malformed


def _parsed(content: bytes) -> list[tuple[int, Any]]:
    """Every row with its number; in the place of one that is no JSON, the error."""
    try:
        whole = json.loads(content)
    except _NOT_JSON:
        lines = enumerate(content.split(b"\n"), 1)
        return [(number, _parse(line)) for number, line in lines if line.strip()]
    if isinstance(whole, dict) and isinstance(whole.get("samples"), list):
        whole = whole["samples"]
    return list(enumerate(whole if isinstance(whole, list) else [whole], 1))


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except _NOT_JSON as error:
        return error


def _fault(raw: Any, scorer: type[Scorer]) -> str:
    """What keeps this from being a row; empty where nothing does."""
    if isinstance(raw, Exception):
        return f"not JSON: {raw}"
    if not isinstance(raw, dict):
        return f"the row is {type(raw).__name__}, not an object"
    wanted = {"gold": "what is right", "answer": "what the model said, or null", **scorer.fields}
    for name, meaning in wanted.items():
        if name not in raw:
            return f"no field {name!r} ({meaning})"
    if not isinstance(raw["answer"], str | None):
        return f"`answer` is {type(raw['answer']).__name__}, not text or null"
    return ""


def _line(number: int, raw: Mapping[str, Any], scorer: type[Scorer]) -> Line:
    name = raw.get("id", raw.get("question_id", number))
    known = {*scorer.fields, *scorer.optional}
    fields = {key: value for key, value in raw.items() if key in known}
    return Line(number, name, Row(str(name), raw["gold"], raw["answer"], fields))


def _judge(
    scorer: Scorer, lines: list[Line], protocol: str
) -> tuple[list[Line], list[Malformed], list[Judged], Summary]:
    """Judge all rows; if one breaks the rule, find it by judging each alone, and judge the others again."""
    try:
        return lines, [], *_verdict(scorer, lines, protocol)
    except _BROKEN as whole:
        sound: list[Line] = []
        broken: list[Malformed] = []
        for line in lines:
            try:
                _verdict(scorer, [line], protocol)
                sound.append(line)
            except _BROKEN as error:
                told = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                broken.append(Malformed(line.number, f"a field is not what {protocol} needs: {told}"))
        if not broken or (not sound and isinstance(whole, InputError)):
            raise
        return sound, broken, *_verdict(scorer, sound, protocol)


def _verdict(scorer: Scorer, lines: list[Line], protocol: str) -> tuple[list[Judged], Summary]:
    rows = [line.row for line in lines]
    judged = scorer.judge(rows, protocol)
    return judged, scorer.summarise(rows, judged, protocol) if rows else {}
