"""How people type: small letters, lost full stops, swapped and missing letters."""

from __future__ import annotations

from random import Random


def as_typed(rng: Random, text: str, typo: float = 0.06) -> str:
    """The sentence as a person may type it; ``typo`` is the chance of one slip in it."""
    if text[0] == "A" and rng.random() < 0.3:
        text = text[1:]
    elif rng.random() < 0.4:
        text = text[0].lower() + text[1:]
    else:
        text = text[0].upper() + text[1:]
    if rng.random() < typo:
        text = _slip(rng, text)
    return text + "." if rng.random() < 0.5 else text


def _slip(rng: Random, text: str) -> str:
    kind, at = rng.choice(("swap", "drop", "double", "blank")), rng.randrange(len(text) - 1)
    if kind == "blank":
        spaces = [index for index, letter in enumerate(text) if letter == " "]
        at = rng.choice(spaces)
        return text[:at] + text[at + 1 :] if rng.random() < 0.5 else text[:at] + " " + text[at:]
    if not text[at : at + 2].isalpha():
        return text
    if kind == "swap":
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind == "drop" else text[:at] + text[at] + text[at:]
