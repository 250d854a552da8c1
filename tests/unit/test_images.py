"""The image gateway: what comes in, as what, and what is refused before it costs anything."""

import ast
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

import vlmix
from vlmix.core.errors import ImageError
from vlmix.core.images import MAX_PIXELS, open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(size=(40, 30)) -> Image.Image:
    grid = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    return Image.fromarray(grid)


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, *, body: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_opens_as_rgb_from_bytes_and_from_a_file_of_any_name(kind, tmp_path):
    raw = encoded(Image.new("RGB", (5, 3), (200, 40, 60)), kind)
    path = tmp_path / "misnamed.txt"
    path.write_bytes(raw)
    for source in (raw, path):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (5, 3))
        assert np.abs(np.asarray(image).astype(int) - (200, 40, 60)).max() < 6


def test_a_plain_picture_in_memory_is_not_copied():
    image = photo()
    assert open_image(image) is image


MODES = {
    "1": (Image.new("1", (1, 1), 1), (255, 255, 255)),
    "L": (Image.new("L", (1, 1), 90), (90, 90, 90)),
    "LA": (Image.new("LA", (1, 1), (0, 51)), (204, 204, 204)),
    "RGBA": (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), (255, 255, 255)),
    "RGBa": (Image.new("RGBA", (1, 1), (0, 0, 255, 255)).convert("RGBa"), (0, 0, 255)),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (Image.new("YCbCr", (1, 1), (128, 128, 128)), (128, 128, 128)),
    "I;16": (Image.fromarray(np.array([[32896]], np.uint16)), (128, 128, 128)),
    "I": (Image.fromarray(np.array([[65535]], np.int32)), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_pixel_modes_follow_the_stated_policy(mode):
    image, expected = MODES[mode]
    assert image.mode == mode
    assert open_image(image).getpixel((0, 0)) == expected


def test_16_bit_grey_is_scaled_and_its_transparent_grey_is_white():
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    row = np.asarray(open_image(encoded(Image.fromarray(grey))))[0, :, 0]
    assert row.tolist() == [0, 1, 128, 255]
    keyed = Image.fromarray(grey)
    keyed.info["transparency"] = 0
    assert open_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_palette_transparency_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    for transparency in (0, b"\x00\xff"):
        out = open_image(encoded(image, transparency=transparency))
        assert [out.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize("image", [Image.new("F", (1, 1)), Image.fromarray(np.array([[70000]], np.int32))])
def test_pixels_without_a_known_range_are_refused(image):
    with pytest.raises(ImageError, match="Convert it to RGB"):
        open_image(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_in_every_mode(mode, orientation):
    # The picture as its owner saw it: one dark corner, at the top left.
    upright = np.full((2, 3), 255, np.uint8)
    upright[0, 0] = 0
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],  # the camera was turned: row 0 of the file is the right side of the scene
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(np.ascontiguousarray(stored)).convert(mode), exif=exif)
    assert (np.asarray(open_image(raw))[..., 0] == upright).all()


def test_only_the_first_frame_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for kind in ("GIF", "WEBP", "PNG"):
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(raw).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_raises_wherever_it_is_cut(kind):
    raw = encoded(photo(), kind)
    shortest_loss = 2 if kind == "GIF" else 1  # a GIF whose end mark alone is gone has every pixel
    cuts = sorted({*range(0, len(raw) - shortest_loss, max(1, len(raw) // 60)), len(raw) - 40})
    for cut in cuts:
        with pytest.raises(ImageError):
            open_image(raw[:cut])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


BOMBS = {
    "png of 50000 x 50000": png_header(50_000, 50_000, 1, 0),
    "png just above the cap": png_header(MAX_PIXELS // 4000 + 1, 4000),
    "gif of 65535 x 65535": b"GIF89a" + b"\xff" * 4 + b"\0\0\0," + b"\0" * 4 + b"\xff" * 4 + b"\0\x02\0;",
    "bmp of 40000 x 40000": b"BM"
    + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, 40_000, 40_000, 1, 24, 0)
    + b"\0" * 24,
    "webp canvas": b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3e\0\xff\x3e\0" + b"\0" * 40,
    "webp lossless": b"RIFF\x40\0\0\0WEBPVP8L\x20\0\0\0\x2f\xff\xff\xff\x0f" + b"\0" * 40,
    "webp lossy": b"RIFF\x40\0\0\0WEBPVP8 \x20\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + b"\0" * 40,
    "jpeg of 65500 x 65500": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\0\x02\x11\0\x03\x11\0"
    b"\xff\xda\0\x02",
}


@pytest.mark.parametrize("name", BOMBS)
def test_too_many_pixels_are_refused_from_the_header(name):
    with pytest.raises(ImageError, match=r"more than 36000000\. Resize it"):
        open_image(BOMBS[name])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"8BPS" + b"\0" * 40,
        b"II*\0" + b"\0" * 40,
        png_header(0, 0),
        png_header(4, 4, body=b"garbage"),
        b"RIFF\0\0\0\0WEBPjunk" + b"\0" * 40,
    ],
)
def test_other_kinds_and_nonsense_are_refused(raw):
    with pytest.raises(ImageError, match=r"Accepted formats|damaged|no pixels"):
        open_image(raw)


def test_compressed_text_chunks_cannot_inflate():
    data = b"k\0\0" + zlib.compress(b"\0" * (1 << 26), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    raw = encoded(photo())
    with pytest.raises(ImageError, match="damaged"):
        open_image(raw[:33] + chunk + raw[33:])


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "absent.png"):
        with pytest.raises(ImageError, match=re.escape(str(path))):
            open_image(path)
    with pytest.raises(ImageError, match="cannot be opened"):
        open_image(tmp_path / "nul\0.png")


@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_mutated_files_give_a_picture_or_a_clean_error(kind, changes):
    raw = bytearray(encoded(photo((12, 9)), kind))
    for place, value in changes:
        raw[place % len(raw)] = value
    image = error = None
    try:
        image = open_image(bytes(raw))
    except ImageError as refusal:
        error = refusal
    assert (image is not None and image.mode == "RGB") or error is not None
    assert not re.search("0x[0-9a-f]{6,}", str(error))
    assert error is None or error.__context__ is None or error.__suppress_context__


def test_warnings_and_pillow_settings_stay_as_they_are():
    code = (
        "import io, numpy, warnings; warnings.simplefilter('error'); from PIL import Image, ImageFile\n"
        "before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))\n"
        "from vlmix.core.images import open_image\n"
        "b = io.BytesIO(); Image.new('1', (9000, 4000)).save(b, 'PNG')\n"
        "assert open_image(b.getvalue()).width == 9000\n"
        "after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))\n"
        "assert before == after"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _opens_images(path: Path) -> list[int]:
    """Lines that decode a picture past the gateway, or change how Pillow decodes for everybody."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("Image", "open"):
                lines.append(node.lineno)
            if isinstance(node.ctx, ast.Store) and node.attr in {"LOAD_TRUNCATED_IMAGES", "MAX_IMAGE_PIXELS"}:
                lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("PIL"):
            lines += [node.lineno for a in node.names if a.name == "open" or a.name.endswith("ImageFile")]
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            lines += [node.lineno for m in modules if m.startswith(("cv2", "imageio", "torchvision.io"))]
    return lines


def test_nothing_else_opens_pictures():
    root = Path(vlmix.__file__).parent
    gateway = root / "core" / "images.py"
    assert _opens_images(gateway)
    found = {str(p.relative_to(root)): _opens_images(p) for p in root.rglob("*.py") if p != gateway}
    assert {name: lines for name, lines in found.items() if lines} == {}
