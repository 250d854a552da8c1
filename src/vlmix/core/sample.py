"""The nouns of data and answers; the same types serve training, judging and serving. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from vlmix.core.stored import StoredPicture

if TYPE_CHECKING:
    from PIL import Image

Role = Literal["system", "user", "assistant"]
State = Literal["read", "unparsed", "guessed", "missing", "failed"]
"""An answer was read; could not be read by the rule; was then guessed for; is not there; its judge failed."""
Choice = Literal["text", "likelihood", "mean_likelihood"]
"""How an option is taken: the model says it, or it is the likeliest, whole or by the token."""
Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture opened only when somebody looks: a path, encoded bytes, a stored one, or pixels in memory."""

    source: Path | bytes | StoredPicture | Image.Image

    def open(self) -> Image.Image:
        """Return the picture as 8-bit RGB, upright.

        Raises:
            ImageError: if it is missing, of a refused kind, too large or unreadable.

        """
        from vlmix.core.images import open_image

        return open_image(self.source)

    def size(self) -> tuple[int, int]:
        """Width and height of the picture that ``open`` returns; no pixel is decoded where a header tells.

        Raises:
            ImageError: as ``open``, as far as the header shows.

        """
        from vlmix.core.images import image_size

        return image_size(self.source)

    def digest(self) -> str:
        """SHA-256 of the picture as it is stored, or of its pixels in memory: nothing is decoded.

        Raises:
            ImageError: if it is missing or cannot be read.

        """
        from vlmix.core.images import image_digest

        return image_digest(self.source)


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker's contribution: text and pictures in the order they appear."""

    role: Role
    parts: tuple[str | ImageRef, ...]

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The pictures of this turn, in order."""
        return tuple(part for part in self.parts if isinstance(part, ImageRef))

    @property
    def text(self) -> str:
        """The text of this turn without its pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Sample:
    """One example: a conversation, and for judging the ``target`` its next answer should match.

    ``task`` groups samples in reports and mixes; ``group`` names the unit that is independent of the
    others (a sentence shown with several pictures is one group), which intervals resample. A ``defect`` says
    why it cannot be asked: it is not, and counts as wrong. ``options`` are the answers among which a model
    may choose by their likelihood.
    """

    id: str
    turns: tuple[Turn, ...]
    target: str | tuple[str, ...] | None = None
    task: str = ""
    group: str = ""
    language: str = "en"
    meta: Mapping[str, Json] = field(default_factory=dict[str, Json])
    defect: str = ""
    options: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The pictures of the conversation, in the order of their placeholders."""
        return tuple(image for turn in self.turns for image in turn.images)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a responder said to one sample; ``error`` is set, and the text empty, where it failed.

    ``nats`` is how unlikely it found the sample's own text, where it was asked that instead.
    """

    sample_id: str
    text: str
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""
    nats: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One question with the answer given to it; ``answer`` is None where there is none.

    ``fields`` are those of the question that the scorer names; ``gold`` is a text, or all accepted ones.
    """

    id: str
    gold: Json
    answer: str | None
    fields: Mapping[str, Json] = field(default_factory=dict[str, Json])


@dataclass(frozen=True, slots=True)
class Judged:
    """What a protocol makes of one row.

    ``value`` is in the protocol's own unit, None where it gives none (a row that it skips, a division by
    zero). ``parsed`` is how it understood the answer. ``state`` tells an answer that was read from one that
    the rule could not read, one for which it then guessed, one that is not there, and one whose judge
    failed. ``detail`` holds further numbers of the row, such as BLEU beside CIDEr.
    """

    value: float | None
    parsed: str = ""
    state: State = "read"
    detail: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Score:
    """One judged answer: ``value`` in 0..1, how the answer was understood, and its task and group.

    ``counts`` are what figures that are no mean of values add up, such as bits and bytes. ``state`` says how
    the answer came to its value. Official rules sum up ``row`` and ``judged``. A question that is asked only
    to judge others by is not ``counted`` in means.
    """

    sample_id: str
    value: float
    parsed: str
    task: str = ""
    group: str = ""
    counts: Mapping[str, float] = field(default_factory=dict[str, float])
    state: State = "read"
    row: Row | None = None
    judged: Judged | None = None
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are produced: greedy unless ``temperature`` is above 0.

    With ``plain`` what was said last is gone on with as it stands, outside any conversation. ``choose`` says
    how samples with options are answered.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    beams: int = 1
    batch_size: int = 64
    plain: bool = False
    choose: Choice = "text"


class Responder(Protocol):
    """Whatever answers samples: a model here, a server elsewhere, a file of canned answers."""

    def respond(self, samples: Iterable[Sample], decoding: Decoding) -> Iterator[Answer]:
        """Yield one answer for each sample, in order."""
        ...
