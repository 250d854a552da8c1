"""Stages that start from another model: are its experts those of the stage? Its configuration tells."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmix.core.errors import CheckpointError, PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.models.configuration import VlmixConfig
from vlmix.models.plan import shape_only
from vlmix.moe.install import expert_layers
from vlmix.moe.layer import ExpertLayer
from vlmix.train.build import mixtures_of
from vlmix.train.recipe import Recipe


def check_starts(recipe: Recipe) -> None:
    """Compare the experts of each folder that a stage starts from with those the model has by then.

    Shapes are compared, so no weight is read; a folder that is not there is passed over.

    Raises:
        CheckpointError: if number, place, form or router differ; names both sides and the remedy.

    """
    for index, stage in enumerate(recipe.stages):
        folder = Path(stage.start_from)
        if stage.start_from != "previous" and (folder / "config.json").is_file():
            # Transforms of the stage itself come after it has started.
            before = recipe.model_copy(update={"stages": recipe.stages[:index]})
            _check(f"stages.{index}.start_from", folder, mixtures_of(before))


def _check(where: str, folder: Path, ours: Sequence[ExpertSettings]) -> None:
    config = _config(where, folder)
    theirs = config.expert_settings()
    if theirs == list(ours):
        return
    found = _layers(config, theirs)
    try:
        wanted = _layers(config, ours)
    except PlanError as error:
        raise CheckpointError(f"{where}: {folder} cannot have the experts of this recipe: {error}") from None
    if _shapes(found) != _shapes(wanted):
        raise CheckpointError(
            f"{where}: {folder} has {_told(found)}, and the model of this stage, so far, {_told(wanted)}; "
            f"they must be the same. {_remedy(theirs)}"
        )


def _config(where: str, folder: Path) -> VlmixConfig:
    kind = VlmixConfig.get_config_dict(folder)[0].get("model_type")
    if kind != VlmixConfig.model_type:
        raise CheckpointError(
            f"{where}: {folder} is a model of type {kind!r}, not {VlmixConfig.model_type!r}"
        )
    return VlmixConfig.from_pretrained(folder, local_files_only=True)


def _layers(config: VlmixConfig, mixtures: Sequence[ExpertSettings]) -> list[ExpertLayer]:
    """The expert layers of the folder's model if it had these mixtures, with shapes alone."""
    changed = copy.deepcopy(config)
    changed.experts = [mixture.model_dump(mode="json") for mixture in mixtures] or None
    changed.adapters = None
    return expert_layers(shape_only(changed).model)


def _shapes(layers: Sequence[ExpertLayer]) -> Mapping[str, tuple[int, ...]]:
    return {
        f"{layer.name}.{name}": tuple(tensor.shape)
        for layer in layers
        for name, tensor in layer.state_dict().items()
    }


def _told(layers: Sequence[ExpertLayer]) -> str:
    """``2 layers of experts (language_model: 2 of 4, ffn, router topk)``."""
    groups: dict[int, list[ExpertLayer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.settings), []).append(layer)
    parts = [
        f"{group[0].settings.place}: {len(group)} of {_counts(group)}, {group[0].settings.kind}, "
        f"router {group[0].settings.router['kind']}"
        for group in groups.values()
    ]
    return f"{len(layers)} layers of experts" + (f" ({'; '.join(parts)})" if parts else "")


def _counts(layers: Sequence[ExpertLayer]) -> str:
    return " or ".join(map(str, sorted({layer.router_experts for layer in layers})))


def _remedy(theirs: Sequence[ExpertSettings]) -> str:
    if not theirs:
        return (
            "The folder is dense: take the mixture out of `model.experts` and put it into this stage, "
            "`before: [{kind: upcycle, …}]`, which comes after start_from"
        )
    written = [mixture.model_dump(mode="json", exclude_defaults=True) for mixture in theirs]
    return (
        f"Give the recipe the folder's, `model.experts: {written}`, without an `upcycle` that makes them "
        "once more"
    )
