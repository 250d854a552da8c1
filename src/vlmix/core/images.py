"""The one gateway through which pictures enter: nothing else in the project decodes an image.

A picture is identified by its first bytes, never by its name; its size is read from the header and
refused before any pixel is decoded; only the first frame is decoded; a damaged file raises. No setting of
Pillow is changed, and its format probing, which would try every plug-in, is not used.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlmix.core.errors import ImageError
from vlmix.core.stored import StoredPicture

MAX_PIXELS: Final = 36_000_000
MAX_FILE_BYTES: Final = 8 * MAX_PIXELS
Picture = Path | bytes | StoredPicture | Image.Image

_HEAD_BYTES: Final = 64
_KINDS: Final[dict[str, tuple[re.Pattern[bytes], type[ImageFile]]]] = {
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    "WebP": (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
    "BMP": (re.compile(rb"BM"), BmpImageFile),
}
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED: Final = frozenset(
    (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
)
_ORIENTATION_TAG: Final = 0x0112
_PLAIN_MODES: Final = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_16_BIT_MODES: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})
# What Pillow's decoders raise on hostile bytes; `Warning` matters where warnings are errors.
_DAMAGE: Final = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)


def open_image(source: Picture) -> Image.Image:
    """Return the first frame of a picture as 8-bit RGB, upright, transparency composited on white.

    16-bit grey is scaled to 8 bits, not clipped. A plain RGB picture in memory is returned as it is, not
    copied.

    Raises:
        ImageError: if it is missing, not a regular file, not PNG, JPEG, WebP, GIF or BMP, larger than
            ``MAX_PIXELS``, damaged, or has pixels without a known range.

    """
    if isinstance(source, Image.Image):
        return _from_memory(source)
    with _stream(source) as (file, name):
        return _decode(file, name)


def image_size(source: Picture) -> tuple[int, int]:
    """Width and height of the upright picture ``open_image`` gives, from the header alone if it says all.

    Raises:
        ImageError: as ``open_image``, as far as the header shows.

    """
    if isinstance(source, Image.Image):
        image = open_image(source)
        return image.size
    with _stream(source) as (file, name):
        return _header_size(file, name)


def encoded_image(source: Picture) -> tuple[bytes, str]:
    """A picture as it is stored, byte for byte, and its kind: PNG, JPEG, WebP, GIF or BMP.

    Pixels in memory become a PNG. Nothing is decoded: whether the picture is whole, ``open_image`` says.

    Raises:
        ImageError: if it is missing, not a regular file, too large or of another kind.

    """
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        open_image(source).save(buffer, format="PNG")
        return buffer.getvalue(), "PNG"
    with _stream(source) as (file, name):
        raw = file.read()
    return raw, _kind(raw[:_HEAD_BYTES], name)


@contextmanager
def _stream(source: Path | bytes | StoredPicture) -> Generator[tuple[IO[bytes], str]]:
    """The encoded bytes, and what messages call them."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), f"the picture of {len(source)} bytes"
    elif isinstance(source, StoredPicture):
        with source.open() as file:
            yield file, source.name
    else:
        with _open_regular(source) as file:
            yield file, str(source)


def image_digest(source: Picture) -> str:
    """SHA-256 of a picture as it is stored, in hexadecimal; of one in memory, that of its pixels.

    Raises:
        ImageError: if it is missing, not a regular file, or cannot be read.

    """
    if isinstance(source, Image.Image):
        image = open_image(source)
        return hashlib.sha256(f"{image.width} {image.height} ".encode() + image.tobytes()).hexdigest()
    with _stream(source) as (file, name):
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise _damaged(name, "file", error) from None


def _header_size(file: IO[bytes], name: str) -> tuple[int, int]:
    kind, image = _opened(file, name)
    try:
        turned = _UPRIGHT.get(_orientation(image)) in _TRANSPOSED
    except _DAMAGE as error:
        raise _damaged(name, kind, error) from None
    return (image.height, image.width) if turned else image.size


def _from_memory(image: Image.Image) -> Image.Image:
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and image.width and image.height:
        return image
    name = "the picture in memory"
    _check_size(image.width, image.height, name)
    return _finish(image, name)


def _open_regular(path: Path) -> IO[bytes]:
    """Open a regular file; a pipe is opened without waiting for its writer, so that it can be refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist. Check the path and the images folder.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be opened ({_clean(error)}). Give a readable file.") from None
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode) and info.st_size <= MAX_FILE_BYTES:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(info.st_mode):
        raise ImageError(f"{path} is not a regular file. Give the path of a picture file.")
    raise ImageError(f"{path} has {info.st_size} bytes, more than {MAX_FILE_BYTES}. Save it smaller.")


def _decode(file: IO[bytes], name: str) -> Image.Image:
    kind, image = _opened(file, name)
    return _finish(image, name, kind)


def _opened(file: IO[bytes], name: str) -> tuple[str, Image.Image]:
    """The kind of a file and its picture, whose pixels are not decoded yet."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    kind = _kind(head, name)
    if kind == "WebP":  # its decoder allocates the canvas before it tells the size
        _check_size(*_webp_size(head, name), name)
    try:
        image = _KINDS[kind][1](file)
    except _DAMAGE as error:
        raise _damaged(name, kind, error) from None
    _check_size(image.width, image.height, name)
    return kind, image


def _kind(head: bytes, name: str) -> str:
    for kind, (magic, _) in _KINDS.items():
        if magic.match(head):
            return kind
    what = "is empty" if not head else "does not begin like a picture"
    raise ImageError(f"{name} {what}. Accepted formats: {', '.join(_KINDS)}.")


def _webp_size(head: bytes, name: str) -> tuple[int, int]:
    """Width and height from the first chunk: RFC 9649, sections 2.5 to 2.7."""
    chunk = head[12:16]
    if len(head) >= 30 and chunk == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if len(head) >= 30 and chunk == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if len(head) >= 25 and chunk == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ImageError(f"{name} is a damaged WebP (no size in its header). Save or download it again.")


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height}: it has no pixels. Remove it.")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height} = {width * height} pixels, more than {MAX_PIXELS}. Resize it first."
        )


def _finish(image: Image.Image, name: str, kind: str = "picture") -> Image.Image:
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image, name)
        return rgb if turn is None else rgb.transpose(turn)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise _damaged(name, kind, error) from None


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation; a block that cannot be read says nothing, so the picture stays as stored."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _16_BIT_MODES:
        return _from_16_bit(image, name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode not in _PLAIN_MODES:
        raise ImageError(
            f"{name} has pixels of mode {image.mode!r}, whose range is not known. Convert it to RGB first."
        )
    return image.convert("RGB")


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """0..65535 -> 0..255, rounded; the colour that PNG names as transparent becomes white."""
    grey_HW = np.asarray(image).astype(np.int64)
    low, high = int(grey_HW.min()), int(grey_HW.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} has grey values {low}..{high}, outside 0..65535. Convert it to RGB first.")
    scaled_HW = ((grey_HW * 255 + 32767) // 65535).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled_HW[grey_HW == key] = 255
    return Image.fromarray(scaled_HW).convert("RGB")


def _damaged(name: str, kind: str, error: BaseException) -> ImageError:
    return ImageError(
        f"{name} is a damaged {kind} ({_clean(error)}). Save or download it again, or remove its row."
    )


def _clean(error: BaseException) -> str:
    """Reduce a foreign message to one short line without memory addresses: those help an attacker."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = (text.splitlines() or [""])[0][:160]
    return re.sub(r"<[^>]*>|0x[0-9a-fA-F]+", "...", first) or type(error).__name__
