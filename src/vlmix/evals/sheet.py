"""Rows of a data set on one HTML page to look at: pictures, questions, answers; everything inside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmix.core.errors import SampleError
from vlmix.core.files import write_text
from vlmix.core.interfaces import Source
from vlmix.core.sample import ImageRef, Turn
from vlmix.evals.gallery import Picture, picture_of

_PAGE = Path(__file__).parent / "page"
_LETTERS = 1200  # longest text of one turn on the page


@dataclass(frozen=True, slots=True)
class RowView:
    """One row: its number, its id, its pictures and who says what; or why it cannot be used."""

    index: int
    name: str
    pictures: Sequence[Picture]
    turns: Sequence[tuple[str, str]]
    problem: str = ""


def row_view(source: Source, index: int) -> RowView:
    """Row ``index`` as people read it."""
    try:
        sample = source[index]
    except SampleError as error:
        return RowView(index, error.sample_id, (), (), error.reason)
    pictures = [picture_of(image) for image in sample.images]
    problem = "; ".join(picture.problem for picture in pictures if picture.problem)
    return RowView(index, sample.id, pictures, [(turn.role, spoken(turn)) for turn in sample.turns], problem)


def spoken(turn: Turn) -> str:
    """What somebody says, with a mark where a picture stands."""
    text = "".join("<image>" if isinstance(part, ImageRef) else part for part in turn.parts)
    return text if len(text) <= _LETTERS else text[:_LETTERS] + "…"


def write_sheet(path: Path, title: str, rows: Iterable[RowView]) -> None:
    """Write the page; nothing in it is fetched, no script runs, and all text of the data is escaped."""
    page = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page.get_template("sheet.html.jinja").render(title=title, rows=list(rows)))
