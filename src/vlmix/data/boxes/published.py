"""The layout of NLVR's official repository (clic-lab/nlvr, folder nlvr), in a folder or a tar file.

``dev/dev.json`` holds one JSON record in each line; the pictures are called ``dev-12-0-3.png``: split, the
record's identifier, and which of six orders the boxes stand in. They are found by name, because some splits
do not say in which folder they lie. A tar is read where it is: nothing is unpacked, only regular members
count, and a member's name is never used as a path.
"""

from __future__ import annotations

import json
import stat
import tarfile
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path, PurePosixPath
from random import Random

from PIL import Image

from vlmix.core.errors import InputError
from vlmix.data.boxes.paint import paint_scene
from vlmix.data.boxes.scene import COLORS, Item, Scene, draw_scene

ORDERS = 6
MAX_TAR_BYTES = 2**31
_MAX_MEMBER_BYTES = 2**28
_WHERE = (
    "Get the folder `nlvr` of the GitHub repository clic-lab/nlvr (or a tar of it), put it under data/nlvr, "
    "and set `path` to it."
)


class PublishedSplit:
    """One split: its records as text, and where each picture is.

    Raises:
        InputError: if the path is missing, is no readable tar, or does not hold the split.

    """

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        if not path.exists():
            raise InputError(f"{path} does not exist. {_WHERE}")
        self.pictures, self.lines = self._folder() if path.is_dir() else self._tar()

    def picture(self, identifier: str, order: int) -> Path | bytes | None:
        """The picture of a record in one of the six orders, 0 to 5, or None if there is none."""
        return self.pictures.get(f"{self.split}-{identifier}-{order}.png")

    def _folder(self) -> tuple[Mapping[str, Path | bytes], list[str]]:
        name = f"{self.split}.json"
        places = [self.path / name, self.path / self.split / name, self.path / "nlvr" / self.split / name]
        found = [place for place in places if place.is_file()]
        if not found:
            raise InputError(f"{self.path}: no {self.split}/{name}. {_WHERE}")
        pictures = {
            file.name: file
            for file in sorted(found[0].parent.rglob(f"{self.split}-*.png"))
            if stat.S_ISREG(file.lstat().st_mode)
        }
        return pictures, _lines(found[0].read_bytes(), found[0])

    def _tar(self) -> tuple[Mapping[str, Path | bytes], list[str]]:
        if self.path.stat().st_size > MAX_TAR_BYTES:
            raise InputError(
                f"{self.path} has more than {MAX_TAR_BYTES} bytes. Unpack it and set `path` to the folder."
            )
        try:
            members = self._members()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{self.path} is no whole tar file: {error}. {_WHERE}") from None
        records = members.pop(f"{self.split}.json", None)
        if records is None:
            raise InputError(f"{self.path}: no {self.split}.json among its members. {_WHERE}")
        return members, _lines(records, self.path)

    def _members(self) -> dict[str, bytes]:
        """The split's records and pictures by file name; the budget bounds what a packed tar may grow to."""
        found: dict[str, bytes] = {}
        left = MAX_TAR_BYTES
        with tarfile.open(self.path, "r:*") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                wanted = name == f"{self.split}.json" or (
                    name.startswith(f"{self.split}-") and name.endswith(".png")
                )
                if not wanted or not member.isreg() or (stream := tar.extractfile(member)) is None:
                    continue
                left -= member.size
                if member.size > _MAX_MEMBER_BYTES or left < 0:
                    raise InputError(f"{self.path}: {member.name} is too large ({member.size} bytes)")
                found[name] = stream.read()
        return found


def _lines(raw: bytes, where: Path) -> list[str]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: the records are not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    return text.splitlines()


def write_tiny_split(folder: Path, split: str) -> None:
    """Write two sentences and four records in the official layout, with all orders of their boxes."""
    rng, pictures, lines = Random(0), folder / split / "images" / "0", list[str]()
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        sentence, towers = (("There is a tower with two blocks", True), ("There is a black circle.", False))[
            number // 2
        ]
        scene, identifier = draw_scene(rng, towers), f"{number // 2}-{number % 2}"
        record = {
            "sentence": sentence,
            "label": "true" if number % 2 else "false",
            "identifier": identifier,
            "structured_rep": [[_record(item) for item in box] for box in scene.boxes],
        }
        lines.append(json.dumps(record))
        for order, boxes in enumerate(permutations(scene.boxes)):
            image = Image.fromarray(paint_scene(Scene(boxes, towers)))
            image.save(pictures / f"{split}-{identifier}-{order}.png")
    (folder / split / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _record(item: Item) -> dict[str, str | int]:
    color = COLORS[item.color]
    return {"x_loc": item.x, "y_loc": item.y, "size": item.size, "type": item.shape, "color": color}
