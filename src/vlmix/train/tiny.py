"""Any recipe at toy size: a dress rehearsal of every code path it has, with none of its quality.

The kinds of encoders, views, fusion, projectors and decoder, what they read and how they join, the stages
with what they train, templates and transforms stay. Sizes, data and weights are replaced: a few blocks of a
few channels, pictures of a few tokens, the sources' own tiny sets, random weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmix.core.errors import InputError, PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.core.parts import BENCHMARKS, ENCODERS, FUSIONS, PROJECTORS, SOURCES, VIEWS, read_part
from vlmix.core.registry import Registry
from vlmix.core.settings import SHRUNK_DEPTH, SHRUNK_WIDTH, divided, read_settings
from vlmix.models.configuration import VisionPlan, VlmixConfig
from vlmix.models.plan import shape_only
from vlmix.moe.install import chosen_layers
from vlmix.moe.structure import feed_forwards
from vlmix.train.build import later_experts, recipe_config
from vlmix.train.recipe import Recipe, Stage

STEPS, BATCH, MICRO_BATCH, QUESTIONS = 2, 4, 2, 4
_LARGEST_FACTOR = 12
_LEAST_SIDE = 2
_VOCABULARY = 320
# The most of each size that a shrunk decoder has, by transformers' own names.
_DECODER = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": SHRUNK_DEPTH,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_EXPERT_WIDTH = 8
# What the tokenizer decides.
_WORDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def shrunk(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` at toy size, with tiny data sets written under ``folder``.

    Raises:
        PlanError: if its vision parts fit together at no smaller size.
        CheckpointError: if the decoder's sizes are known to its weights alone, and those cannot be read.

    """
    raw = recipe.model_dump(mode="json")
    raw["name"] = f"{recipe.name}_tiny"
    raw["model"] = _model(recipe)
    raw["stages"] = [_stage(stage, folder) for stage in recipe.stages]
    _shrink_later(recipe, raw)
    raw["feature_cache"]["folder"] = None  # toys do not go where real features are
    raw["evals"] = [
        {"benchmark": _benchmark(judged.benchmark["kind"], folder), "limit": QUESTIONS, "task": judged.task}
        for judged in recipe.evals
    ]
    raw["fidelity"] = ["A dress rehearsal at toy size: nothing is learnt and nothing is claimed."]
    return read_settings(Recipe, raw)


def _model(recipe: Recipe) -> dict[str, Any]:
    config = recipe_config(recipe)
    language = _decoder(config.language.to_dict())
    vision = _vision(config, language)
    small = VlmixConfig(text_config=language, **vision)
    return {
        **recipe.model.model_dump(mode="json"),
        **vision,
        "language_model": language,
        "tokenizer": {"train": {"vocab_size": _VOCABULARY, "samples": 20}},
        "experts": [_mixture(mixture, config, small) for mixture in recipe.model.experts],
    }


def _mixture(mixture: ExpertSettings, full: VlmixConfig, small: VlmixConfig) -> dict[str, Any]:
    """A mixture of narrow experts; layers that are listed keep their place between first and last."""
    raw = mixture.model_dump(mode="json")
    if mixture.width is not None:
        raw["width"] = min(mixture.width, _EXPERT_WIDTH)
    if isinstance(mixture.layers, str) and isinstance(mixture.count, int):
        return raw
    before, after = _networks(full, mixture.place), _networks(small, mixture.place)
    chosen = chosen_layers(mixture, before)
    counts = [mixture.count] * len(chosen) if isinstance(mixture.count, int) else list(mixture.count)
    counts = counts * len(chosen) if len(counts) == 1 else counts
    kept = {layer * after // before: count for layer, count in zip(chosen, counts, strict=True)}
    return {**raw, "layers": list(kept), "count": list(kept.values())}


def _networks(config: VlmixConfig, place: str) -> int:
    """Feed-forward networks of a part of the model."""
    bare = copy.deepcopy(config)
    bare.experts = None
    return len(feed_forwards(shape_only(bare).model.get_submodule(place)))


def _shrink_later(recipe: Recipe, raw: dict[str, Any]) -> None:
    """The mixtures that stages put in."""
    listed = [transform for stage in raw["stages"] for transform in stage["before"]]
    later = [transform for transform in listed if transform["kind"] == "upcycle"]
    if later:
        model = raw["model"]
        parts = {key: model[key] for key in ("image_size", "encoders", "views", "fusion", "projector")}
        small = VlmixConfig(text_config=model["language_model"], **parts)
        for transform, mixture in zip(later, later_experts(recipe), strict=True):
            transform["experts"] = _mixture(mixture, recipe_config(recipe), small)


def _vision(config: VlmixConfig, language: dict[str, Any]) -> dict[str, Any]:
    """Encoders, views, fusion and projector at the smallest size at which they fit together as they did."""
    plan, problem = config.plan(), ""
    least = [min(_LEAST_SIDE, *spec.grid) for spec in plan.encoders]
    for factor in range(_LARGEST_FACTOR, 0, -1):
        try:
            parts = _parts(config, factor)
            found = VlmixConfig(text_config=language, **parts).plan()
        except InputError as error:
            problem = str(error)
            continue
        wide = all(min(spec.grid) >= side for spec, side in zip(found.encoders, least, strict=True))
        if wide and all(a in {None, b} for a, b in zip(_windows(plan), _windows(found), strict=True)):
            return parts
    raise PlanError(f"no smaller size at which the vision parts fit together was found. {problem}")


def _windows(plan: VisionPlan) -> list[float | None]:
    """How many cells of each encoder stand along one of the first's; ``None`` if that is no whole number."""
    rows = [spec.grid[0] for spec in plan.offered]
    return [row / rows[0] if row % rows[0] == 0 else None for row in rows]


def _parts(config: VlmixConfig, factor: int) -> dict[str, Any]:
    return {
        "image_size": divided(config.image_size, factor, "image_size"),
        "encoders": [_part(ENCODERS, raw, factor) for raw in config.encoders or []],
        "views": _part(VIEWS, config.views or {}, factor),
        "fusion": _part(FUSIONS, config.fusion or {}, factor),
        "projector": _part(PROJECTORS, config.projector or {}, factor),
    }


def _part(registry: Registry[Any], raw: dict[str, Any], factor: int = 1) -> dict[str, Any]:
    small = read_part(registry, raw).shrunk(factor).model_dump(mode="json")
    return {key: value for key, value in small.items() if key != "weights"}


def _decoder(full: dict[str, Any]) -> dict[str, Any]:
    """A decoder of the same type with few layers and experts, heads grouped as before where that divides."""
    found = {key: min(full[key], most) for key, most in _DECODER.items() if isinstance(full.get(key), int)}
    small: dict[str, Any] = dict(found)
    small["hidden_size"] = SHRUNK_WIDTH
    if isinstance(groups := full.get("num_key_value_heads"), int):
        heads = small["num_attention_heads"]
        small["num_key_value_heads"] = max(1, heads * groups // full["num_attention_heads"])
    if isinstance(kinds := full.get("layer_types"), list):
        small["layer_types"] = kinds[: small["num_hidden_layers"]]
    rope = full.get("rope_parameters") or {}
    if "partial_rotary_factor" in rope:  # channels are turned in pairs
        head = SHRUNK_WIDTH // small["num_attention_heads"]
        pairs = max(1, round(head * rope["partial_rotary_factor"] / 2))
        small["rope_parameters"] = {**rope, "partial_rotary_factor": 2 * pairs / head}
    default = CONFIG_MAPPING[full["model_type"]]().to_dict()
    changed = {key: value for key, value in full.items() if key in default and value != default[key]}
    left = {key: value for key, value in changed.items() if key not in _WORDS and not key.startswith("_")}
    return {**left, **small, "model_type": full["model_type"]}


def _stage(stage: Stage, folder: Path) -> dict[str, Any]:
    raw = stage.model_dump(mode="json")
    solo = raw["solo"]
    return {
        **raw,
        "data": [_data(data, folder) for data in raw["data"]],
        "solo": solo and {**solo, "projector": _part(PROJECTORS, solo["projector"])},
        "batch_size": min(stage.batch_size, BATCH),
        "micro_batch_size": stage.micro_batch_size and min(stage.micro_batch_size, MICRO_BATCH),
        "steps": STEPS,
        "epochs": None,
        "before": [transform for transform in raw["before"] if "weights" not in transform],
        "start_from": "previous",
        "save_every_steps": stage.save_every_steps and 1,
        "max_bad": 0.0,
        "workers": min(stage.workers, 1),
    }


def _data(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    weight = None if data["weight"] is None else 1.0
    kept = {"group": data["group"], "name": data["name"]}
    return {"source": _source(data["source"], folder), "weight": weight, **kept}


def _source(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The source's tiny set, read with the recipe's settings as far as they name no file."""
    place = folder / raw["kind"]
    place.mkdir(parents=True, exist_ok=True)
    small = SOURCES.get(raw["kind"]).tiny(place)
    given = read_part(SOURCES, raw)
    free = {
        name
        for name in given.model_fields_set - small.model_fields_set
        if not isinstance(getattr(given, name), Path)
    }
    own = small.model_dump(mode="json", include=small.model_fields_set)
    return {"kind": raw["kind"], **given.model_dump(mode="json", include=free), **own}


def _benchmark(kind: str, folder: Path) -> dict[str, Any]:
    place = folder / f"judge_{kind}"
    place.mkdir(parents=True, exist_ok=True)
    return BENCHMARKS.get(kind).tiny(place).settings.model_dump(mode="json")
