"""Tables of Hugging Face `datasets`: folders of save_to_disk, parquet, arrow or JSON files, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image
from pydantic import Field, model_validator

from vlmix.core.errors import InputError, SampleError, UnknownNameError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Sample
from vlmix.core.settings import PartSettings
from vlmix.data.llava_rows import (
    PLACEHOLDER,
    Spoken,
    check_placeholders,
    conversation,
    find_picture,
    illustrated,
    row_id,
)
from vlmix.data.tables import (
    Cell,
    Place,
    as_list,
    cell,
    columns_of,
    is_local,
    library,
    parsed,
    pictures_in,
    rows_in,
)

_SPEAKERS: Final = {"user": "human", "assistant": "gpt"}
_MAX_CHARACTERS: Final = 4 * 2**20


class HfDatasetSettings(PartSettings):
    """Where the table is, and which of its columns say what.

    ``path`` is a folder, a file or a hub id with ``name``, ``split`` and ``revision`` as `datasets` has them;
    ``cache`` is where it keeps what it made. A row is one question with its answer where ``question`` and
    ``answer`` name columns, else the column ``conversations``: LLaVA's turns, ``role`` and ``content``, or
    pairs of ``user`` and ``assistant``. ``image`` is the column of one or several pictures: encoded, or paths
    inside the folder ``images``. Pictures that no placeholder stands for come before the first question,
    except in LLaVA's turns, which must have as many.
    """

    kind: Literal["hf_dataset"] = "hf_dataset"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    cache: str | None = None
    conversations: str = "conversations"
    question: str | None = None
    answer: str | None = None
    image: str = "image"
    id: str = "id"
    images: Path | None = None
    max_turns: int = Field(default=1000, ge=2)

    @model_validator(mode="after")
    def _pair(self) -> HfDatasetSettings:
        if (self.question is None) != (self.answer is None):
            raise ValueError("give both `question` and `answer`, or neither")
        return self


@SOURCES.register("hf_dataset")
class HfDataset(Source):
    """Rows of a table; pictures are read when they are opened, and decoded by the gateway alone."""

    settings_class = HfDatasetSettings
    settings: HfDatasetSettings

    def __len__(self) -> int:
        """Rows of the table."""
        return rows_in(self._place)

    def __getitem__(self, index: int) -> Sample:
        """Read row ``index`` without its pictures.

        Raises:
            SampleError: if the row cannot be used.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)}")
        row = cell(self._place, self._columns, index)
        name = f"{row_id({'id': row.get(self.settings.id, '')})}#{index + 1}"
        try:
            spoken, strict = self._spoken(row)
            refs = self._pictures(index)
            placeholders = sum(text.count(PLACEHOLDER) for role, text in spoken if role == "user")
            if refs and not placeholders and not strict:
                first = next(number for number, (role, _) in enumerate(spoken) if role == "user")
                spoken[first] = ("user", PLACEHOLDER * len(refs) + spoken[first][1])
            check_placeholders(spoken, len(refs))
        except SampleError as error:
            raise SampleError(error.reason, line=index + 1, sample_id=name, fault=error.fault) from None
        return Sample(id=name, turns=illustrated(spoken, refs), group=name)

    @classmethod
    def places(cls, settings: HfDatasetSettings) -> list[Path]:
        """The table, where ``path`` can be no hub id, and the folder of pictures."""
        local = [Path(settings.path)] if is_local(settings.path) else []
        return local + ([] if settings.images is None else [settings.images])

    @classmethod
    def tiny(cls, folder: Path) -> HfDatasetSettings:
        """Three rows saved to disk: one picture, two, and text only."""
        datasets = library()
        red, blue = (Image.new("RGB", (24, 16), colour) for colour in ("red", "blue"))
        questions = [
            f"{PLACEHOLDER}\nWhat colour?",
            f"{PLACEHOLDER}{PLACEHOLDER}\nWhich is red?",
            "Two and two?",
        ]
        turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": "red"}] for q in questions]
        columns = {"id": ["a", "b", "c"], "conversations": turns, "image": [[red], [red, blue], []]}
        features = datasets.Features(
            {
                "id": datasets.Value("string"),
                "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
                "image": datasets.List(datasets.Image()),
            }
        )
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / "train.parquet"))
        return HfDatasetSettings(path=str(folder / "train.parquet"), cache=str(folder / "cache"))

    @cached_property
    def _place(self) -> Place:
        s = self.settings
        return Place(path=s.path, name=s.name, split=s.split, revision=s.revision, cache=s.cache)

    @cached_property
    def _columns(self) -> tuple[str, ...]:
        """The columns that are text; each that is wanted exists."""
        s, known = self.settings, columns_of(self._place)
        wanted = [s.conversations] if s.question is None else [s.question, str(s.answer)]
        for column in wanted:
            if column not in known:
                raise UnknownNameError(f"column of {s.path}", column, known)
        return (*wanted, *([s.id] if s.id in known else []))

    @cached_property
    def _has_pictures(self) -> bool:
        known = columns_of(self._place)
        if self.settings.image in known:
            return True
        if "image" in self.settings.model_fields_set:
            raise UnknownNameError(f"column of {self.settings.path}", self.settings.image, known)
        return False

    @cached_property
    def _root(self) -> Path:
        folder = self.settings.images
        if folder is None or not folder.is_dir():
            raise InputError(f"{self.settings.path}: its pictures are paths. Set `images` to their folder.")
        return folder.resolve()

    def _spoken(self, row: Mapping[str, Any]) -> tuple[Spoken, bool]:
        """The turns, and whether placeholders must be there already."""
        s = self.settings
        if s.question is not None:
            pair = [{"from": "human", "value": row[s.question]}, {"from": "gpt", "value": row[str(s.answer)]}]
            return conversation(pair, s.max_turns), False
        turns, strict = _as_llava(parsed(row[s.conversations]))
        if sum(len(str(turn)) for turn in as_list(turns)) > _MAX_CHARACTERS:
            raise SampleError(f"the conversation has more than {_MAX_CHARACTERS} characters")
        return conversation(turns, s.max_turns), strict

    def _pictures(self, index: int) -> list[ImageRef]:
        """The row's pictures: none is opened, and of embedded ones no byte is kept."""
        if not self._has_pictures:
            return []
        column = self.settings.image
        paths = pictures_in(self._place, column, index)
        return [
            ImageRef(
                Cell(self._place, column, index, number) if path is None else find_picture(self._root, path)
            )
            for number, path in enumerate(paths)
        ]


def _as_llava(value: Any) -> tuple[Any, bool]:
    """Turns in LLaVA's words, and whether they were so; what is none of the known forms stays as it is."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value, True
    if value and all("role" in turn and "content" in turn for turn in value):
        return [
            {"from": _SPEAKERS.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in value
        ], False
    if value and all("user" in turn and "assistant" in turn for turn in value):
        return [turn for pair in value for turn in _exchange(pair)], False
    return value, True


def _exchange(pair: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    return {"from": "human", "value": pair["user"]}, {"from": "gpt", "value": pair["assistant"]}
