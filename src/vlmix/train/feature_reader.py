"""Looks up what encoders said about pictures, in whichever process opens them; a hit decodes no picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from vlmix.core.errors import ImageError
from vlmix.core.sample import ImageRef
from vlmix.core.views import Tiling
from vlmix.models.batching import Encoded, Opened
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.viewing import Viewing, tilings_tensor
from vlmix.train.feature_store import place, read_tensors

KEYS = "picture_keys"
_NO_KEY = bytes(32)


def seen_name(encoder: int, level: int) -> str:
    """The name in a batch of an encoder's map, or of one of its levels."""
    return f"seen.{encoder}.{level}"


@dataclass(frozen=True, slots=True)
class FeatureReader:
    """Answers below ``folder`` of the ``encoders``, by number, to pictures as ``images`` cuts them."""

    folder: Path
    encoders: dict[int, str]
    images: VlmixImageProcessor
    viewing: Viewing

    def kept(self, samples: Sequence[Encoded]) -> list[Opened] | None:
        """The pictures of several samples as the encoders saw them; ``None`` unless all are there."""
        if not any(sample.images for sample in samples):
            return None
        try:
            keyed = [[self._keyed(image) for image in sample.images] for sample in samples]
        except ImageError:
            return None
        places = {self._place(number, key) for row in keyed for key, _ in row for number in self.encoders}
        if not all(path.is_file() for path in places):
            return None
        found = [self._row(row) for row in keyed]
        return None if None in found else [row for row in found if row is not None]

    def keyed(self, sample: Encoded, opened: Opened) -> Opened:
        """Opened pictures with the keys under which answers to them are to be stored."""
        keys = []
        for image in sample.images:
            try:
                keys.append(bytes.fromhex(self._keyed(image)[0]))
            except ImageError:  # it changed just now
                keys.append(_NO_KEY)
        stacked = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, len(_NO_KEY))
        return opened.along({KEYS: torch.from_numpy(stacked.copy())})

    def _row(self, keyed: Sequence[tuple[str, Tiling]]) -> Opened | None:
        """The pictures of one sample."""
        if not keyed:
            return self.images.open([])
        columns: dict[str, list[Tensor]] = {}
        for key, _ in keyed:
            for number in self.encoders:
                tensors = read_tensors(self._place(number, key), key)
                if tensors is None:
                    return None
                for level, tensor in enumerate(tensors):
                    columns.setdefault(seen_name(number, level), []).append(tensor)
        cut, tilings = self.images.views is not None, [tiling for _, tiling in keyed]
        rows = sum(self.viewing.counts(tilings)) if cut else len(keyed)
        blank = torch.empty(rows, 3, 0, 0, dtype=torch.uint8)
        opened = Opened(blank, tilings_tensor(tilings) if cut else None)
        return opened.along({name: torch.cat(tensors) for name, tensors in columns.items()})

    def _place(self, encoder: int, key: str) -> Path:
        return place(self.folder, self.encoders[encoder], key)

    def _keyed(self, image: ImageRef) -> tuple[str, Tiling]:
        """A digest of all that decides what encoders are shown of a picture, and how it is cut."""
        tiling = self.viewing.plan.tiling
        if self.images.views is not None:
            tiling = self.images.tiling(image.size())
        shown = (
            image.digest(),
            (self.images.image_size, self.images.fit, self.images.pad_color),
            self.viewing.settings.model_dump(mode="json"),
            (tiling.rows, tiling.columns, tiling.height, tiling.width),
            PIL.__version__,
        )
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest(), tiling
