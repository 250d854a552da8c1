"""How questions are put: LLaVA's endings, options by their letters, and splits that nobody can score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vlmix.core.errors import SampleError
from vlmix.evals.scoring._fields import lettered

IN_A_WORD: Final = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 adds where a short answer is wanted (haotian-liu/LLaVA@05f156c docs/Evaluation.md)."""

BY_LETTER: Final = "\nAnswer with the option's letter from the given choices directly."
"""What LLaVA-1.5 adds behind options (haotian-liu/LLaVA@05f156c docs/Evaluation.md)."""

DOTTED: Final = "{}. {}"
"""LLaVA's and lmms-eval's form of an option."""

BRACKETED: Final = "({}) {}"
"""The form of an option in MMMU's and MathVista's own scripts."""


def listed(options: Sequence[str], form: str = DOTTED) -> str:
    """Options below one another, each with its letter, behind a line break."""
    return "".join(f"\n{form.format(letter, option)}" for letter, option in lettered(options).items())


def letters_of(options: Sequence[str]) -> tuple[str, ...]:
    """The letters of options, A first."""
    return tuple(lettered(options))


def texts_in(raw: object) -> list[str]:
    """A list of at least two texts.

    Raises:
        SampleError: if it is none.

    """
    if not isinstance(raw, list) or len(raw) < 2 or not all(isinstance(each, str) for each in raw):
        raise SampleError(f"no list of options: {str(raw)[:80]!r}")
    return [str(each) for each in raw]


def with_answers(split: str, known: Sequence[str]) -> str:
    """The split, if its answers are published.

    Raises:
        ValueError: if they are not.

    """
    if split not in known:
        raise ValueError(f"{split!r} is no split whose answers are published; ask {' or '.join(known)}")
    return split
