"""What a packed row says besides its conversation, so that it reads back as the very sample it was."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field, ValidationError

from vlmix.core.errors import SampleError
from vlmix.core.sample import Json, Sample, Turn
from vlmix.core.settings import Settings
from vlmix.data.llava_rows import written

FIELD: Final = "vlmix"
"""The key of a row under which it stands; other tools pass over it."""


class _Rest(Settings):
    id: str
    target: str | tuple[str, ...] | None = None
    task: str = ""
    group: str = ""
    language: str = "en"
    meta: dict[str, Any] = Field(default_factory=dict)


def packed(sample: Sample) -> dict[str, Json]:
    """A sample as a LLaVA row; its pictures are the members beside it.

    Raises:
        SampleError: if its text has a placeholder without a picture.

    """
    rest = _Rest(
        id=sample.id,
        target=sample.target,
        task=sample.task,
        group=sample.group,
        language=sample.language,
        meta=dict(sample.meta),
    )
    return {"id": sample.id, "conversations": written(sample.turns), FIELD: rest.model_dump(mode="json")}


def unpacked(raw: Any, turns: tuple[Turn, ...]) -> Sample:
    """The sample that ``packed`` was given, with its pictures where they lie now.

    Raises:
        SampleError: if what stands under ``FIELD`` was not written by ``packed``.

    """
    try:
        rest = _Rest.model_validate(raw)
    except ValidationError as error:
        where = ".".join(str(step) for step in error.errors()[0]["loc"])
        raise SampleError(f"{FIELD}.{where}: {error.errors()[0]['msg']}") from None
    return Sample(
        id=rest.id,
        turns=turns,
        target=rest.target,
        task=rest.task,
        group=rest.group,
        language=rest.language,
        meta=rest.meta,
    )
