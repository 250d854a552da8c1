"""Small text: numbers and words written where a low-resolution eye sees a smudge."""

from __future__ import annotations

from typing import Final

from numpy.random import Generator

from vlmix.data.synth.drawing import Canvas, Dial, Item, Pixels
from vlmix.data.synth.fonts import text_width
from vlmix.data.synth.scenes import scatter


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WORDS: Final = _split(
    "ant arm axe bag bat bed bee box boy bus cap car cat cow cup day dog ear egg eye "
    "fan fig fox gem hat hen ice ink jam jar key leg lid log map mud net nut oak owl "
    "pan pen pie pig pot rat rug saw sea sky sun tea tie toe toy van wax web zip zoo"
)
LONG_WORDS: Final = _split(
    "apple beach bread chair cloud dance earth field glass heart house juice knife lemon "
    "mouse night ocean paper queen river snake table tiger train uncle voice water wheel"
)
MAX_LENGTH: Final = 5


def digits(rng: Generator, dial: Dial) -> Item:
    """A number of two digits, or up to four at full difficulty; never with a leading zero."""
    written = number(rng, dial)
    return Item(_write(rng, dial, written), "What number is written?", written, {"length": len(written)})


def words(rng: Generator, dial: Dial) -> Item:
    """A word of the list."""
    written = word(rng, dial)
    return Item(
        _write(rng, dial, written.upper()), "What word is written?", written, {"length": len(written)}
    )


def number(rng: Generator, dial: Dial) -> str:
    """Two digits, or up to four at full difficulty; never with a leading zero."""
    length = int(rng.integers(2, dial.between(2, 4) + 1))
    return str(rng.integers(10 ** (length - 1), 10**length))


def word(rng: Generator, dial: Dial) -> str:
    """One of the list."""
    known = word_list(dial)
    return known[rng.integers(len(known))]


def place(rng: Generator, canvas: Canvas, dial: Dial, text: str, cell: tuple[int, int, int]) -> None:
    """Write near the middle of a square cell (left, top, side), inside the picture."""
    left, top, side = cell
    width, height = text_width(len(text), dial.text_height), dial.text_height
    x, y = (
        start + (side - size) // 2 + int(rng.integers(-2, 3)) * dial.unit
        for start, size in ((left, width), (top, height))
    )
    limit = dial.image_size - 1
    canvas.text(
        text, min(max(x, 1), limit - width), min(max(y, 1), limit - height), dial.text_height, canvas.ink()
    )


def word_list(dial: Dial) -> tuple[str, ...]:
    """The words that can be written: twelve when easy, then more, and long ones from half difficulty on."""
    return WORDS + LONG_WORDS if dial.difficulty >= 0.5 else WORDS[: 12 + round(96 * dial.difficulty)]


def _place(rng: Generator, dial: Dial, size: int) -> int:
    """Where text of ``size`` pixels begins: near the middle when easy, anywhere from half difficulty on."""
    middle = (dial.image_size - size) // 2
    astray = min(2 * dial.unit + round(2 * dial.difficulty * middle), middle - 1)
    return middle + int(rng.integers(-astray, astray + 1))


def _write(rng: Generator, dial: Dial, text: str) -> Pixels:
    canvas = Canvas(rng, dial)
    width, height = text_width(len(text), dial.text_height), dial.text_height
    x, y = (_place(rng, dial, size) for size in (width, height))
    scatter(rng, canvas, dial, dial.between(0, 4), (x - 1, y - 1, x + width + 1, y + height + 1))
    canvas.text(text, x, y, height, canvas.ink())
    return canvas.finish()
