"""Conversation -> segments that remember where they came from: template, speaker or picture.

The template is rendered with a sentinel in place of everything a speaker said, and the result is cut at the
sentinels. What somebody types therefore never passes through the template, and is never taken for a
control token or for the place of a picture. The label mask comes from the same cut: ``{% generation %}``
leaves sentinels too.

A template that leaves questions out on purpose, as LLaVA's `plain` does, says so with
``{% set discards_questions = true %}``; any other that loses a part is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlmix.core.errors import InputError, SampleError
from vlmix.core.sample import Role, Turn

IMAGE: Final = "<image>"
Scalar = str | int | float | bool | None
Shape = tuple[tuple[Role, tuple[bool, ...]], ...]
"""A conversation without what was said: each turn's role, and whether each part is text."""
_OPEN, _CLOSE = "\ue000", "\ue001"
_BEGIN, _END = f"{_OPEN}begin{_CLOSE}", f"{_OPEN}end{_CLOSE}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the rendered conversation.

    ``control`` is the template's own text, ``text`` is what a speaker said, ``image`` is a picture's place.
    ``supervised`` pieces are the answers with what ends them; ``turn`` counts from 0 and is None for
    control text outside answers.
    """

    kind: Literal["control", "text", "image"]
    text: str
    supervised: bool = False
    turn: int | None = None


def render(
    template: str,
    turns: Sequence[Turn],
    *,
    add_generation_prompt: bool = False,
    image_token: str = IMAGE,
    variables: Mapping[str, Scalar] | None = None,
) -> list[Segment]:
    """Cut the conversation, as ``template`` writes it, into segments; joined, they are the whole prompt.

    ``variables`` are given to the template as they are, and count as its own text: never put there what a
    stranger typed.

    Raises:
        InputError: if the template fails, or loses, repeats or reorders what was said or shown.
        SampleError: if a text is not valid Unicode.

    """
    spoken = [turn.parts or ("",) for turn in turns]
    shape = tuple(
        (turn.role, tuple(isinstance(part, str) for part in parts))
        for turn, parts in zip(turns, spoken, strict=True)
    )
    given = tuple(sorted((variables or {}).items()))
    outline = _outline(template, shape, add_generation_prompt, image_token, given)
    texts = [
        _checked(part, number)
        for number, parts in enumerate(spoken)
        for part in parts
        if isinstance(part, str)
    ]
    return [
        Segment("text", texts[int(part.text)], part.supervised, part.turn) if part.kind == "text" else part
        for part in outline
    ]


def prompt_text(segments: Iterable[Segment]) -> str:
    """The whole prompt as one string."""
    return "".join(segment.text for segment in segments)


def template_variables(template: str) -> set[str]:
    """The names a template reads from outside, such as ``enable_thinking``."""
    environment = _compile(template).environment
    return meta.find_undeclared_variables(environment.parse(template)) - {"messages", "add_generation_prompt"}


@lru_cache(maxsize=256)
def _outline(
    template: str,
    shape: Shape,
    add_generation_prompt: bool,
    image_token: str,
    variables: tuple[tuple[str, Scalar], ...],
) -> tuple[Segment, ...]:
    """The segments of every conversation of this shape; a text segment holds the number of its text.

    What was said never reaches the template, so samples that differ only in that share one rendering.
    """
    for text in (template, *(str(value) for _, value in variables)):
        if _OPEN in text:
            raise InputError(f"a chat template and its variables may not contain {_OPEN!a}. Remove it.")
    marked = _Marked.of(shape, image_token)
    context = dict(variables) | {
        "messages": marked.messages,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        module = _compile(template).make_module(context)
    except TemplateError as error:
        raise InputError(f"the chat template cannot write this conversation: {error.message}") from None
    segments = marked.cut(str(module))
    marked.check(segments, discards_questions=bool(module.__dict__.get("discards_questions", False)))
    return tuple(segments)


@dataclass(frozen=True, slots=True)
class _Marked:
    """A conversation whose texts are sentinels with their numbers; which turn each text and image is of."""

    messages: list[dict[str, Any]]
    text_turns: list[int]
    image_turns: list[int]
    roles: list[Role]
    image_token: str

    @staticmethod
    def of(shape: Shape, image_token: str) -> _Marked:
        marked = _Marked([], [], [], [role for role, _ in shape], image_token)
        for turn, (role, parts) in enumerate(shape):
            content: list[dict[str, str]] = []
            for is_text in parts:
                if is_text:
                    content.append({"type": "text", "text": f"{_OPEN}{len(marked.text_turns)}{_CLOSE}"})
                    marked.text_turns.append(turn)
                else:
                    content.append({"type": "image"})
                    marked.image_turns.append(turn)
            # Templates of language models alone know only strings, so text alone is given as one.
            alone = "".join(part["text"] for part in content) if all(parts) else content
            marked.messages.append({"role": role, "content": alone})
        return marked

    def cut(self, rendered: str) -> list[Segment]:
        """Split at the sentinels and at the template's own image tokens."""
        splitter = re.compile(f"({_OPEN}[^{_CLOSE}]*{_CLOSE}|{re.escape(self.image_token)})")
        segments: list[Segment] = []
        answer_start: int | None = None
        images = 0
        for piece in splitter.split(rendered):
            supervised = answer_start is not None
            if piece == _BEGIN:
                answer_start = len(segments)
            elif piece == _END:
                segments[answer_start:] = _own(segments[answer_start:])
                answer_start = None
            elif piece == self.image_token:
                turn = self.image_turns[images] if images < len(self.image_turns) else None
                segments.append(Segment("image", piece, supervised, turn))
                images += 1
            elif piece.startswith(_OPEN):
                segments.append(Segment("text", piece[1:-1], supervised, self._turn_of(piece[1:-1])))
            elif piece:
                segments.append(Segment("control", piece, supervised))
        return segments

    def _turn_of(self, number: str) -> int:
        if not number.isdigit() or int(number) >= len(self.text_turns):
            raise InputError("the chat template alters what was said. Give one that writes it as it is.")
        return self.text_turns[int(number)]

    def check(self, segments: Sequence[Segment], *, discards_questions: bool) -> None:
        """Refuse a template that does not write every part once and in order."""
        shown = sum(segment.kind == "image" for segment in segments)
        if shown != len(self.image_turns):
            raise InputError(
                f"the chat template wrote {shown} {self.image_token} for {len(self.image_turns)} pictures. "
                "Give one that knows parts of type 'image', such as 'chatml'."
            )
        due = [
            str(number)
            for number, turn in enumerate(self.text_turns)
            if not discards_questions or self.roles[turn] == "assistant"
        ]
        said = [segment.text for segment in segments if segment.kind == "text"]
        if said != due:
            raise InputError(
                f"the chat template wrote {len(said)} of {len(due)} texts, or in another order. "
                "Give one that writes every turn once."
            )


def _own(answer: list[Segment]) -> list[Segment]:
    """Give the control text of one answer the turn of what was said in it."""
    turn = next((segment.turn for segment in answer if segment.turn is not None), None)
    return [replace(segment, turn=turn) if segment.turn is None else segment for segment in answer]


def _checked(text: str, turn: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"turn {turn} has half a character (a lone surrogate) at position {error.start}. Remove it."
        ) from None
    return text


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}``: marks what the model is trained to say."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads this name as it is)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Read the block and put its two sentinels around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_output(_BEGIN, line), *body, _output(_END, line)]


def _output(text: str, line: int) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text)]).set_lineno(line)


def _raise(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise InputError(f"the chat template is not valid jinja: {error.message}") from None
