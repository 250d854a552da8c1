"""Which model a stage runs: the whole one, or one encoder of it alone before the shared language model.

Alone, an encoder is trained with a projector of the stage's own (pre-alignment in Eagle, arXiv:2408.15998).
The solo model holds the very modules of the whole one, so that nothing need be copied back, and keeps the
encoder's place in the list, so that parameters have the names they have there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vlmix.core.errors import PlanError, RecipeError
from vlmix.core.parts import PROJECTORS
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.train.build import Setup
from vlmix.train.recipe import Recipe, SoloSettings, Stage
from vlmix.train.trainable import Selection, select
from vlmix.train.transforms.reinitialise import redraw

_ALONE = 2**31  # no stage has this number


@dataclass(frozen=True, slots=True)
class Running:
    """What a stage trains: a ``model`` and its ``processor``; a checkpoint holds all of ``kept``."""

    model: VlmixForConditionalGeneration
    processor: VlmixProcessor
    kept: nn.Module


class WithSolo(nn.Module):
    """A whole model under its own names, and a solo stage's projector beside it."""

    def __init__(self, whole: VlmixForConditionalGeneration, projector: nn.Module) -> None:
        super().__init__()
        self.model, self.solo_projector = whole.model, projector


def stage_seed(recipe: Recipe, index: int) -> tuple[int, int]:
    """What random numbers of stage ``index`` come from: a solo stage's are the same at every place."""
    return recipe.seed, index if recipe.stages[index].solo is None else _ALONE


def draw_from(seed: tuple[int, int], rank: int) -> None:
    """Let torch's own generators start anew from ``seed``; each process has a stream of its own."""
    torch.manual_seed(_number(seed if rank == 0 else (*seed, rank)))


def running(setup: Setup, stage: Stage, seed: tuple[int, int]) -> Running:
    """The model that ``stage`` runs; a solo projector is drawn from ``seed`` and disturbs no other draw.

    Raises:
        PlanError: if the solo projector does not fit the encoder.

    """
    if stage.solo is None:
        return Running(setup.model, setup.processor, setup.model)
    model = solo_model(setup.model, stage.name, stage.solo)
    inner, config = model.model, model.config
    settings = config.projector_settings()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_number(seed))
        plan = config.plan()
        inner.projector = PROJECTORS.get(settings.kind)(settings, plan.fused, config.width).float()
        named = {f"projector.{name}": value for name, value in inner.projector.named_parameters()}
        redraw(model, named, f"stage {stage.name}: solo.projector")
    if setup.model.device.type != "meta":
        inner.projector.to(setup.model.device)
    return Running(model, _processor(setup.processor, config), WithSolo(setup.model, inner.projector))


def solo_model(
    whole: VlmixForConditionalGeneration, stage: str, solo: SoloSettings
) -> VlmixForConditionalGeneration:
    """One encoder of ``whole`` before its language model; the projector has shapes and no data.

    Raises:
        PlanError: if there is no such encoder or the projector does not fit it; names the ``stage``.

    """
    config = _solo_config(whole.config, solo)
    try:
        config.plan()
    except PlanError as error:
        raise PlanError(f"stage {stage}, solo: {error}") from None
    with torch.device("meta"):
        alone = VlmixForConditionalGeneration(config)
    inner = alone.model
    inner.encoders = nn.ModuleList(
        [
            encoder if index == solo.encoder else nn.Identity()
            for index, encoder in enumerate(whole.model.encoders)
        ]
    )
    inner.views, inner.language_model = whole.model.views, whole.model.language_model
    return alone


def _number(seed: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def select_for(stage: Stage, model: nn.Module) -> Selection:
    """``select`` for the model that ``stage`` runs.

    Raises:
        RecipeError: if a glob matches nothing, or only what later globs take over.

    """
    try:
        return select(model, stage.train, stage.layer_decay)
    except RecipeError as error:
        if stage.solo is None:
            raise
        raise RecipeError(
            f"stage {stage.name}: {error}. This stage has encoder {stage.solo.encoder} alone, a projector of "
            "its own and the language model"
        ) from None


def _solo_config(config: VlmixConfig, solo: SoloSettings) -> VlmixConfig:
    alone = copy.deepcopy(config)
    alone.fusion = {"kind": "single", "which": solo.encoder}
    alone.projector = dict(solo.projector)
    # They are on the modules that are shared already.
    alone.adapters = alone.experts = None
    return alone


def _processor(whole: VlmixProcessor, config: VlmixConfig) -> VlmixProcessor:
    """The same words and pictures, and as many placeholders as the solo model has visual tokens."""
    return VlmixProcessor(
        VlmixImageProcessor.of(config, whole.image_processor.fit),
        whole.tokenizer,
        chat_template=whole.chat_template,
        image_seq_length=config.image_seq_length,
        image_token=whole.image_token,
        max_length=whole.max_length,
        reads_instruction=whole.reads_instruction,
    )
