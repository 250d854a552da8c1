"""Pictures of any shape -> squares: padded, or the middle cut out."""

from __future__ import annotations

from PIL import Image

# Padding first, as LLaVA does, makes a square of the longer side; a longer one is reduced before.
_LONGEST_PADDED_SIDE = 6000
_LONGEST_CROPPED = 16  # times the shorter side


def padded(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square, rounded towards the top left (LLaVA, `expand2square`)."""
    longest = max(image.size)
    if longest > _LONGEST_PADDED_SIDE:
        scale = _LONGEST_PADDED_SIDE / longest
        width, height = (max(1, round(side * scale)) for side in image.size)
        image, longest = image.resize((width, height), Image.Resampling.BICUBIC), _LONGEST_PADDED_SIDE
    square = Image.new("RGB", (longest, longest), color)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square


def cropped(image: Image.Image, side: int) -> Image.Image:
    """The middle of the picture with its shorter side made ``side``, rounded as CLIP's own processor does."""
    shortest = min(image.size)
    reach = _LONGEST_CROPPED * shortest
    if max(image.size) > reach:  # what lies further out is cut off in any case, and would only cost memory
        wide, high = (min(length, reach) for length in image.size)
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        image = image.crop((left, top, left + wide, top + high))
    width, height = (side if length == shortest else side * length // shortest for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
