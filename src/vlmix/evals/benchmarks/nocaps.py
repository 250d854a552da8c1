"""NoCaps (Agrawal et al. 2019): a sentence for pictures of things that COCO's pictures do not show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._asking import with_answers
from vlmix.evals.benchmarks._captions import (
    CAPTIONED,
    CaptionBenchmark,
    CaptionSettings,
    coco_lines,
    stored_lines,
)
from vlmix.evals.benchmarks._layout import first_of
from vlmix.evals.benchmarks._tiny import draw, write

_FILE: Final = "nocaps_val_4500_captions.json"
_HOW: Final = "It is had from nocaps.org, which says how its pictures are had from Open Images."


class NoCapsSettings(CaptionSettings):
    """The folder with ``nocaps_val_4500_captions.json``; ``images`` is that of the pictures inside it."""

    rule: ClassVar = "nocaps"
    kind: Literal["nocaps"] = "nocaps"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "val"
    images: str = "images"

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ("val",))


@BENCHMARKS.register("nocaps")
class NoCaps(CaptionBenchmark):
    """``entire.CIDEr``, beside that of pictures near to COCO and far from it; papers print 100 times that.

    The prompt is lmms-eval's (EvolvingLMMs-Lab/lmms-eval@9c039a7
    ``tasks/nocaps/_default_template_nocaps_yaml``).
    """

    settings_class = NoCapsSettings
    settings: NoCapsSettings
    paper = "nocaps: novel object captioning at scale (Agrawal et al., ICCV 2019)"
    headlines: ClassVar = {"ptb": "entire.CIDEr", "simple": "entire.CIDEr"}

    def lines(self) -> Iterator[tuple[str, object]]:
        """The pictures, in the order of the file; a table does not tell how far from COCO they are."""
        names = [_FILE, f"annotations/{_FILE}"]
        if table := self.settings.table("validation", names):
            return stored_lines(table, "image_id", "annotations_captions")
        return coco_lines(first_of(self.settings.path, names, _HOW), self.settings.images)

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two pictures near to COCO, two far from it."""
        draw(folder / "images", *(name for name, _ in CAPTIONED))
        domains = ("in-domain", "in-domain", "out-domain", "out-domain")
        images = [
            {"id": number, "file_name": name, "domain": domain, "open_images_id": Path(name).stem}
            for number, ((name, _), domain) in enumerate(zip(CAPTIONED, domains, strict=True))
        ]
        annotations = [
            {"image_id": number, "caption": caption, "id": 10 * number + place}
            for number, (_, captions) in enumerate(CAPTIONED)
            for place, caption in enumerate(captions)
        ]
        whole = {"images": images, "annotations": annotations}
        write(folder / _FILE, whole)
        return cls(NoCapsSettings(path=folder))
