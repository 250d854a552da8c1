"""Outputs of frozen encoders, computed once for each picture and kept on disk for whoever asks again.

Which stages use it, under which keys answers are found, and what becomes of a batch: pictures that are all
known come as answers already; otherwise the encoders look at all of them, and what was missing is stored.
With the cache switched off the same stages let their encoders look in the same way and store nothing, so that
the switch changes no bit of a result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vlmix.core.errors import RecipeError
from vlmix.core.feature_cache import FeatureCacheSettings
from vlmix.core.files import storage_errors
from vlmix.core.tensors import FeatureMap, Grid
from vlmix.models.adapters import AdaptedLinear
from vlmix.models.features import SeenPictures
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.looking import Asked, at_once, layout, look, obstacle, questions
from vlmix.models.modeling import VlmixModel
from vlmix.train.feature_reader import KEYS, FeatureReader, seen_name
from vlmix.train.feature_store import SCHEMA, FeatureStore, place, raw_bytes, read_tensors
from vlmix.train.order import DataOrder
from vlmix.train.recipe import Recipe, Stage

FOLDER, LOOKS = "features", "features.jsonl"
Looks = Literal["inside", "alone", "kept"]
"""Encoders run inside the model, ahead of it, or ahead of it and only where nobody stored what they say."""
_LIBRARIES = ("vlmix", "torch", "transformers", "timm")
_GB = 10**9


class FeatureCache:
    """The answers of one stage's encoders; ``reader`` goes to the processes that open pictures.

    ``found`` pictures came from the cache, ``computed`` ones did not. Without a ``store`` all are computed.
    ``seconds`` is what each encoder took, by number, where answers are stored.
    """

    def __init__(
        self,
        model: VlmixModel,
        images: VlmixImageProcessor,
        precision: str,
        store: FeatureStore | None,
    ) -> None:
        self.model, self.store = model, store
        self.asked = questions(model)
        self.reader: FeatureReader | None = None
        if store is not None:
            keys = {
                number: encoder_key(model, number, what, precision)
                for number, what in enumerate(self.asked)
                if what != "nothing"
            }
            self.reader = FeatureReader(store.folder, keys, images, model.viewing)
        self.found = self.computed = 0
        self.seconds = [0.0] * len(self.asked)
        self._layout: list[list[tuple[int, ...]]] | None = None

    def shown(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A micro-batch as the model takes it; call it where the model runs, under the same autocast."""
        kept = {name: value for name, value in batch.items() if not name.startswith("seen.")}
        if len(kept) < len(batch):
            maps = tuple(self._maps(batch, number) for number in range(len(self.asked)))
            seen = SeenPictures(maps, len(batch["pixel_values"]))
            self.found += len(batch.get("image_tilings", batch["pixel_values"]))
            return {**kept, "pixel_values": self._laid_out(seen)}
        keys = kept.pop(KEYS, None)
        if not len(kept.get("pixel_values", ())):
            return kept
        pictures = kept.pop("picture_values", None)
        told = None if self.store is None else self._took
        seen = look(self.model, self.asked, kept["pixel_values"], pictures, told)
        if keys is not None:
            self._store(seen, keys, kept)
        return {**kept, "pixel_values": self._laid_out(seen)}

    @property
    def summary(self) -> str:
        """How often a picture was found; empty where none is stored."""
        if self.store is None:
            return ""
        total = self.found + self.computed
        return f"features: {self.found:,} of {total:,} pictures from the cache in {self.store.folder}"

    def write_down(self, path: Path, stage: str, pictures: int) -> None:
        """Append a line on what a stage of so many different rows found, computed, and how long that took.

        ``encoders`` has the digest and the seconds of each encoder whose answers are stored.
        """
        if self.reader is None:
            return
        encoders = {key: self.seconds[number] for number, key in self.reader.encoders.items()}
        counts = {"pictures": pictures, "found": self.found, "computed": self.computed}
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **counts, "encoders": encoders}) + "\n")

    def _took(self, number: int, seconds: float) -> None:
        self.seconds[number] += seconds

    def _laid_out(self, seen: SeenPictures) -> SeenPictures:
        if self._layout is None:
            self._layout = layout(self.model, self.asked)
        return seen.laid_out(self._layout)

    def _maps(self, batch: Mapping[str, Tensor], number: int) -> tuple[FeatureMap, ...]:
        grids = _grids(self.model, number, self.asked[number])
        return tuple(FeatureMap(batch[seen_name(number, level)], grid) for level, grid in enumerate(grids))

    def _store(self, seen: SeenPictures, keys: Tensor, batch: Mapping[str, Tensor]) -> None:
        store, reader, viewing = self.store, self.reader, self.model.viewing
        if store is None or reader is None:
            return
        self.computed += len(keys)
        counts = viewing.counts(viewing.tilings(batch["pixel_values"], batch.get("image_tilings")))
        rows = [[1] * len(counts) if scope == "picture" else counts for scope in viewing.scopes]
        for key, answers in zip(keys.cpu().numpy(), seen.split(rows), strict=True):
            picture = key.tobytes().hex()
            for number, encoder in reader.encoders.items():
                # Read, not looked for: a damaged file is there as well.
                if key.any() and read_tensors(place(store.folder, encoder, picture), picture) is None:
                    store.write(encoder, picture, [found.tokens for found in answers[number]])


def feature_store(recipe: Recipe, out: Path, say: Callable[[str], None], writers: int = 1) -> FeatureStore:
    """The folder that the recipe names, or one below ``out``, for one of ``writers`` processes."""
    settings = recipe.feature_cache
    return FeatureStore(_folder(settings, out), int(settings.limit_gb * _GB), say, writers)


def feature_cache(
    looks: Looks, stage: Stage, model: VlmixModel, images: VlmixImageProcessor, store: FeatureStore
) -> FeatureCache | None:
    """The cache of a stage; ``None`` where encoders run inside the model."""
    if looks == "inside":
        return None
    if why := obstacle(model):  # what was no obstacle when the run was planned, such as divided weights
        store.say(f"features: encoders run in every step, because {why}")
        return None
    return FeatureCache(model, images, stage.precision, store if looks == "kept" else None)


def looks_of_stages(
    recipe: Recipe, obstacles: Sequence[str], orders: Sequence[DataOrder], say: Callable[[str], None]
) -> tuple[Looks, ...]:
    """How the encoders of each stage look at pictures; ``obstacles`` say why it cannot use the cache.

    Left to itself (``auto``) a stage uses it where a picture will be seen again: in a further epoch, in
    another stage with the same data and no training of encoders between, or by others who use the folder.

    Raises:
        RecipeError: if a stage must use it and cannot.

    """
    settings = recipe.feature_cache
    found: list[Looks] = []
    for index, (stage, order) in enumerate(zip(recipe.stages, orders, strict=True)):
        if stage.cache_features is True and settings.use and obstacles[index]:
            raise RecipeError(
                f"stages.{index}.cache_features: features cannot be kept because {obstacles[index]}. "
                "Leave it out, or say `auto`"
            )
        again = settings.folder is not None or order.draws > sum(order.sizes)
        again = again or any(_shares(recipe, obstacles, index, other) for other in range(len(recipe.stages)))
        if obstacles[index] and again and stage.cache_features and settings.use:
            say(f"features: stage {stage.name} runs its encoders in every step, because {obstacles[index]}")
        if obstacles[index] or not (again or stage.cache_features is True):
            found.append("inside")
        else:
            found.append("kept" if settings.use and stage.cache_features else "alone")
    return tuple(found)


def remove_own(recipe: Recipe, out: Path) -> None:
    """Delete what a finished run kept for itself alone."""
    if recipe.feature_cache.folder is None:
        shutil.rmtree(_folder(recipe.feature_cache, out), ignore_errors=True)


def encoder_key(model: VlmixModel, number: int, what: Asked, precision: str) -> str:
    """A digest of all that decides what an encoder says of given pixels, the pixels themselves aside."""
    encoder = cast("nn.Module", model.encoders[number])
    settings = model.config.encoder_settings()[number].model_dump(mode="json", exclude={"weights"})
    adapters = {
        name: [dict(layer.scaling), sorted(layer.active_adapters)]
        for name, layer in encoder.named_modules()
        if isinstance(layer, AdaptedLinear)
    }
    about = {
        "schema": SCHEMA,
        "settings": settings,
        "adapters": adapters,
        "tensors": {name: _digest(tensor) for name, tensor in _tensors(encoder).items()},
        "asked": what,
        "precision": [precision, torch.get_float32_matmul_precision()],
        "device": [*_machine(model.device), at_once(model.device, encoder)],
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _shares(recipe: Recipe, obstacles: Sequence[str], one: int, other: int) -> bool:
    """Whether two stages draw from a common source and no stage from one to the other trains encoders."""
    ours, theirs = ([data.source for data in recipe.stages[at].data] for at in (one, other))
    between = obstacles[min(one, other) : max(one, other) + 1]
    return one != other and not any(between) and any(source in theirs for source in ours)


def _folder(settings: FeatureCacheSettings, out: Path) -> Path:
    return out / FOLDER if settings.folder is None else Path(settings.folder).expanduser()


def _grids(model: VlmixModel, number: int, what: Asked) -> list[Grid]:
    spec = model.viewing.plan.encoders[number]
    if what == "nothing":
        return []
    return [level.grid for level in spec.levels] if what == "levels" and spec.levels else [spec.grid]


def _tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved among them."""
    named = {**encoder.state_dict(), **dict(encoder.named_buffers())}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _machine(device: torch.device) -> list[str | int]:
    """What of a device decides the last bits: its model, or a CPU's instructions and number of threads."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _digest(tensor: Tensor) -> str:
    about = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    about.update(raw_bytes(tensor.detach().cpu()))
    return about.hexdigest()
