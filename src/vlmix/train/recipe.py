"""The schema of a recipe: a model, the stages that train it, and how it is judged. No torch.

A part is written as a mapping with its ``kind``; its other keys are checked against the part's own
settings by ``vlmix.train.checks``, which imports the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from vlmix.core.adapters import AdapterSettings
from vlmix.core.batching import BatchingSettings
from vlmix.core.experts import ExpertSettings
from vlmix.core.feature_cache import FeatureCacheSettings
from vlmix.core.optimization import EmaSettings, ScheduleSettings, SpikeSettings
from vlmix.core.parallel import ParallelSettings
from vlmix.core.settings import Settings

Raw = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
LayerDecay = Annotated[float, Field(gt=0, le=1)]
Fit = Literal["pad", "stretch", "crop"]
LANGUAGE: Final = "language"


class TokenizerTraining(Settings):
    """How a tokenizer is made from the text of the recipe's own data."""

    vocab_size: Annotated[int, Field(ge=300)] = 4096
    samples: PositiveInt = 5000


class TokenizerSettings(Settings):
    """A tokenizer: either ``weights`` (a hub id or folder) or ``train``."""

    weights: str | None = None
    train: TokenizerTraining | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.weights is None) == (self.train is None):
            raise ValueError("give exactly one of `weights` (a hub id or folder) and `train`")
        return self


class ModelSettings(Settings):
    """The parts of the model.

    An encoder may carry ``weights`` (a hub id or folder) beside its own settings. The language model is
    ``{weights: hub id or folder}`` or a transformers text configuration with its ``model_type``, trained
    from scratch; ``config`` beside ``weights`` is the configuration they must have, so that the recipe can
    be planned where they are not. ``image_size`` is the side of the canonical picture and ``fit`` how
    pictures are made square; ``views`` may show a picture as several tiles, of that side where they follow
    its shape. ``max_length`` is the longest conversation in tokens. ``adapters`` put low-rank pairs on
    Linears of encoders and language model; stages train them as ``*lora_*``. ``experts`` take the place of
    feed-forward networks before the first stage; before a later one, ``upcycle`` does that.
    """

    image_size: PositiveInt
    fit: Fit = "pad"
    encoders: Annotated[list[Raw], Field(min_length=1)]
    views: Raw = Field(default_factory=lambda: {"kind": "whole"})
    fusion: Raw
    projector: Raw
    language_model: Raw
    tokenizer: TokenizerSettings
    chat_template: str = "plain"
    max_length: PositiveInt = 2048
    adapters: list[AdapterSettings] = Field(default_factory=list)
    experts: list[ExpertSettings] = Field(default_factory=list)

    @field_validator("language_model")
    @classmethod
    def _weights_or_config(cls, raw: Raw) -> Raw:
        if ("weights" in raw) == ("model_type" in raw):
            raise ValueError(
                "give either `weights` (a hub id or folder) or a text configuration with `model_type`"
            )
        if "weights" in raw and raw.keys() - {"weights", "config"}:
            raise ValueError(
                "`weights` brings its own configuration; remove the other keys, or put what it must be "
                "under `config`"
            )
        if "config" in raw and (not isinstance(raw["config"], dict) or "model_type" not in raw["config"]):
            raise ValueError("`config` is a text configuration with `model_type`")
        return raw


class DataSettings(Settings):
    """One source of a stage's mix; ``weight`` is its share of the draws, relative to the other weights.

    Where sources name a ``group`` instead, every group gets the same share of the draws and divides it among
    its sources by their rows.

    A published set carries its ``name``, its number of ``rows``, with which it is planned where it is absent
    (a number that ends in zeros is read as rounded), and in ``get`` where it comes from and where to put it.
    """

    source: Raw
    weight: PositiveFloat | None = None
    group: str = ""
    name: str = ""
    rows: PositiveInt | None = None
    get: str = ""


class SoloSettings(Settings):
    """One encoder of the model, counted from 0, alone before the language model.

    The ``projector`` between them is fresh when the stage begins and gone when it ends. With ``reuse`` a run
    that did the same before, in any mixture, spares the training.
    Paper: Eagle, arXiv:2408.15998, pre-alignment.
    """

    encoder: Annotated[int, Field(ge=0)]
    projector: Raw
    reuse: bool = True


class Stage(Settings):
    """One stage of training.

    ``train`` maps globs over parameter names (``encoders.0.*``, ``projector.*``, ``language_model.*``) to
    learning rates; the last glob that matches a parameter counts, and what none matches is frozen.
    ``batch_size`` is samples per optimizer step, run ``micro_batch_size`` at a time or as ``batching`` says.
    A stage with a ``task`` is learnt by the recipe's ``continual`` method. With ``publish`` the model as it
    is after the stage is kept, under the stage's name in the run's folder ``models``. ``max_bad`` is the
    share of unusable rows above which training stops. ``workers`` processes prepare data, and one that gives
    nothing for ``worker_timeout`` seconds ends the run. ``chat_template`` and ``fit`` are the model's unless
    given. In a ``solo`` stage ``projector.*`` is the solo one. ``layer_decay`` multiplies learning rates of
    encoders and language model once for each block on the way from their output; in a mapping from globs to
    factors the last that matches counts. ``fused_loss`` never holds all logits of a micro-batch.
    ``tell_samples`` writes the ids of each step's samples beside its metrics, by process.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    task: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9_-]*)?$")] = ""
    train: Annotated[dict[Text, PositiveFloat], Field(min_length=1)]
    data: Annotated[list[DataSettings], Field(min_length=1)]
    chat_template: Text | None = None
    fit: Fit | None = None
    solo: SoloSettings | None = None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    batching: BatchingSettings = BatchingSettings()
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    optimizer: Raw = Field(default_factory=dict, validate_default=True)
    schedule: ScheduleSettings = ScheduleSettings()
    layer_decay: LayerDecay | dict[Text, LayerDecay] = 1.0
    ema: EmaSettings | None = None
    spikes: SpikeSettings | None = None
    clip: PositiveFloat | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    fused_loss: bool = False
    compile: bool = False
    before: list[Raw] = Field(default_factory=list)
    start_from: Text = "previous"
    save_every_steps: PositiveInt | None = None
    publish: bool = False
    tell_samples: bool = False
    max_bad: Share = 0.01
    cache_features: Literal["auto"] | bool = "auto"
    workers: Annotated[int, Field(ge=0)] = 0
    worker_timeout: NonNegativeFloat = 600.0

    @field_validator("optimizer")
    @classmethod
    def _adamw_unless_named(cls, raw: Raw) -> Raw:
        return {"kind": "adamw", **raw}

    @model_validator(mode="after")
    def _length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if len({data.weight is None for data in self.data}) > 1:
            raise ValueError("data: give every source a `weight`, or none (each row once per epoch)")
        if len({bool(data.group) for data in self.data}) > 1:
            raise ValueError("data: give every source a `group`, or none")
        if self.data[0].group and self.data[0].weight is not None:
            raise ValueError("data: a `group` decides the shares; remove each `weight`, or each `group`")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}"
            )
        return self


class EvalSettings(Settings):
    """One benchmark to judge the finished model by, on its first ``limit`` questions.

    ``task`` is what it measures: a stage's task, or ``language`` for what was there before the first. Stages
    that ``publish`` are then judged by it too, and the report shows what was forgotten.
    """

    benchmark: Raw
    limit: PositiveInt | None = None
    task: str = ""


class Recipe(Settings):
    """Everything that decides what a run trains; ``fidelity`` says where it differs from the ``paper``.

    ``continual`` is how stages with a ``task`` keep what came before; task 1 is the language model's own.
    Results of solo stages are kept in the folder ``results``: ``.aligned`` beside the run's unless given.
    """

    name: Text
    paper: str = ""
    model: ModelSettings
    stages: Annotated[list[Stage], Field(min_length=1)]
    continual: Raw | None = None
    evals: list[EvalSettings] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=0)] = 0
    results: Text | None = None
    feature_cache: FeatureCacheSettings = FeatureCacheSettings()
    parallel: ParallelSettings = ParallelSettings()
    fidelity: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {', '.join(twice)}; give each its own name")
        return self

    @model_validator(mode="after")
    def _every_task_is_measured(self) -> Self:
        measured = {judged.task for judged in self.evals if judged.task}
        known = {LANGUAGE, *(stage.task for stage in self.stages if stage.task)}
        if strangers := sorted(measured - known):
            raise ValueError(f"evals: no stage has the task {', '.join(strangers)}")
        if measured and (missing := sorted(known - measured)):
            raise ValueError(
                f"evals: give every task a benchmark, or none; {', '.join(missing)} has no `task: …` here"
            )
        tasks = [stage.publish for stage in self.stages if stage.task]
        if measured and not all(tasks):
            raise ValueError("evals: a `task` is judged after every task; set `publish` on those stages")
        return self

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        tasks = [stage.task for stage in self.stages if stage.task]
        if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
            raise ValueError(f"two stages are the task {', '.join(twice)}; a task is one stage")
        if self.continual is not None and not tasks:
            raise ValueError("continual: no stage has a `task`, so there is nothing for the method to do")
        if alone := [stage.name for stage in self.stages if stage.task and stage.solo is not None]:
            raise ValueError(
                f"stage {alone[0]}: a task is learnt by the whole model; remove `solo` or `task`"
            )
        return self

    @model_validator(mode="after")
    def _solo_encoders_exist(self) -> Self:
        count = len(self.model.encoders)
        for number, stage in enumerate(self.stages):
            if stage.solo is not None and stage.solo.encoder >= count:
                raise ValueError(
                    f"stages.{number}.solo.encoder: there is no encoder {stage.solo.encoder}; they are "
                    f"counted from 0 and there are {count}"
                )
        return self


def recipe_schema() -> Mapping[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    return Recipe.model_json_schema()
