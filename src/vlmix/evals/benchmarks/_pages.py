"""The files of the Robust Reading Competition on documents: a list of questions, each about one page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from vlmix.core.errors import SampleError
from vlmix.core.sample import ImageRef
from vlmix.evals.benchmarks._layout import picture


def page(root: Path, folders: Iterable[str], name: str) -> ImageRef:
    """The picture of a page: in the first of these folders that is there, else in the first of them.

    Raises:
        SampleError: if the name leads out of the folder.

    """
    known = list(folders)
    folder = next((each for each in known if (root / each).is_dir()), known[0])
    return picture(root / folder, PurePosixPath(name).name)


def answers_of(row: dict[str, Any]) -> list[str]:
    """The accepted answers.

    Raises:
        SampleError: if there is none.

    """
    found = [str(answer) for answer in row.get("answers") or []]
    if not found:
        raise SampleError("it has no `answers`")
    return found
