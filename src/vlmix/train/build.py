"""Recipe -> model and processor, both decided by the recipe's seed and data alone."""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmix.core.errors import CheckpointError, RecipeError, SampleError
from vlmix.core.experts import ExpertSettings
from vlmix.core.files import publish, verify_manifest, write_manifest
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES, read_part
from vlmix.models.adapters import add_adapters
from vlmix.models.configuration import VlmixConfig, reads_instruction
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import shape_only
from vlmix.models.processing import VlmixProcessor
from vlmix.models.rendering import IMAGE, prompt_text, render
from vlmix.models.templates import load_template
from vlmix.models.tokenization import CONTROL_TOKENS, prepare_tokenizer, train_tokenizer
from vlmix.train.optim import check_learning
from vlmix.train.published import Published, draw_others, fill_decoder
from vlmix.train.recipe import ModelSettings, Recipe, Stage, TokenizerTraining
from vlmix.train.recipe_file import parts_of
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms.load_encoder import load_encoder
from vlmix.train.transforms.replicate import ReplicateSettings
from vlmix.train.transforms.upcycle import UpcycleSettings
from vlmix.train.upcycling import upcycle_model

SETUP_SCHEMA = "vlmix.setup/1"


@dataclass(slots=True)
class Setup:
    """A model with its processor; several processes exchange the model when a stage begins.

    Where the decoder has shapes alone, ``published`` is what each process reads its share of.
    """

    model: VlmixForConditionalGeneration
    processor: VlmixProcessor
    published: Published | None = None


def check_parts(recipe: Recipe) -> None:
    """Check every part's settings against the part itself.

    Raises:
        RecipeError: if a key or value of a part does not fit; names it and the nearest known key.

    """
    for where, registry, raw in parts_of(recipe):
        read_part(registry, raw, where)
    for index, stage in enumerate(recipe.stages):
        check_learning(stage, f"stages.{index}")


def build(recipe: Recipe, *, decoder_by_slices: bool = False) -> Setup:
    """Make tokenizer, processor and model as the recipe says, weights included.

    With ``decoder_by_slices`` a decoder has shapes alone where its published weights can be read by slices.

    Raises:
        RecipeError: if the tokenizer and the language model do not fit together.
        PlanError: if the parts do not.
        CheckpointError: if published weights cannot be read, or do not fit.

    """
    processor, config = build_processor(recipe)
    # Last of all: experts take the place of trained networks, and 4 bits that of loaded weights.
    config.adapters = None
    weights = recipe.model.language_model.get("weights")
    if weights is None:
        setup = Setup(new_model(config, processor, recipe.seed), processor)
    else:
        setup = _with_published(config, processor, weights, recipe.seed)
    model = setup.model
    for index, encoder in enumerate(recipe.model.encoders):
        if "weights" in encoder:
            load_encoder(model, index, encoder["weights"])
    if setup.published is not None:
        decoder, rest = model.model.language_model, recipe.model.experts or recipe.model.adapters
        if not decoder_by_slices or rest or setup.published.by_slices(decoder) is None:
            with _readable("language_model", setup.published.weights):
                fill_decoder(model, setup.published)
            setup.published = None
    for settings in recipe.model.experts:
        upcycle_model(model, settings)
    if recipe.model.adapters:
        add_adapters(model, recipe.model.adapters)
    return setup


def _with_published(config: VlmixConfig, processor: VlmixProcessor, weights: str, seed: int) -> Setup:
    """A model drawn from ``seed`` but for its decoder, which has shapes alone."""
    model = new_model(config, processor, None)
    draw_others(model, seed)
    rows = _published(weights).vocab_size
    return Setup(model, processor, Published.of(weights, model.model.language_model, rows))


def recipe_config(recipe: Recipe) -> VlmixConfig:
    """The configuration of the recipe's model without making a tokenizer: what ``vlmix plan`` counts.

    A tokenizer to be trained counts with the vocabulary it may have at most; a decoder of known size needs
    neither tokenizer nor weights.
    """
    settings, training = recipe.model, recipe.model.tokenizer.train
    raw = settings.language_model
    experts = mixtures_of(recipe)
    text = raw.get("config") or (_published(raw["weights"]).to_dict() if "weights" in raw else raw)
    if training is not None:
        text = {"vocab_size": training.vocab_size, **text}
    elif "vocab_size" not in text:
        config = build_processor(recipe)[1]
        config.experts = [mixture.model_dump(mode="json") for mixture in experts] or None
        return config
    return _config(settings, text, text["vocab_size"], experts)


def later_experts(recipe: Recipe) -> list[ExpertSettings]:
    """The mixtures that stages put in before they begin, in order."""
    raws = [raw for stage in recipe.stages for raw in stage.before if raw["kind"] == "upcycle"]
    return [cast("UpcycleSettings", read_part(TRANSFORMS, raw)).experts for raw in raws]


def mixtures_of(recipe: Recipe) -> list[ExpertSettings]:
    """Every mixture as it is when the last stage has begun: those of the model, then those of stages."""
    found = list(recipe.model.experts)
    for raw in (raw for stage in recipe.stages for raw in stage.before):
        settings = read_part(TRANSFORMS, raw)
        if isinstance(settings, UpcycleSettings):
            found.append(settings.experts)
        elif isinstance(settings, ReplicateSettings) and settings.mixture < len(found):
            found[settings.mixture] = found[settings.mixture].model_copy(update={"count": settings.count})
    return found


def build_processor(recipe: Recipe) -> tuple[VlmixProcessor, VlmixConfig]:
    """The processor, its tokenizer loaded or trained, and the configuration of the model it serves."""
    settings = recipe.model
    tokenizer = prepare_tokenizer(_tokenizer(recipe))
    image_token_id = cast("int", tokenizer.convert_tokens_to_ids(IMAGE))
    config = _config(settings, _text_config(settings, tokenizer), image_token_id)
    processor = VlmixProcessor(
        VlmixImageProcessor.of(config, settings.fit),
        tokenizer,
        chat_template=_template(settings.chat_template),
        image_seq_length=config.image_seq_length,
        max_length=settings.max_length,
        reads_instruction=config.reads_instruction or any(map(reads_instruction, mixtures_of(recipe))),
    )
    return processor, config


def new_model(
    config: VlmixConfig, processor: VlmixProcessor, seed: int | None
) -> VlmixForConditionalGeneration:
    """A model in float32 with random weights drawn from ``seed``, or shapes alone without one.

    It stops where an answer ends.
    """
    if seed is None:
        model = shape_only(config, torch.float32)
    else:
        torch.manual_seed(seed)
        model = VlmixForConditionalGeneration(config).float()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = processor.stop_token_ids
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def save_setup(setup: Setup, folder: Path) -> None:
    """Write configuration and processor, so that a resumed run need not train its tokenizer again."""
    with publish(folder) as new:
        setup.model.config.save_pretrained(new)
        setup.processor.save_pretrained(new)
        write_manifest(new, SETUP_SCHEMA)


def load_setup(folder: Path, seed: int | None) -> Setup:
    """The processor of an earlier ``save_setup``, and its model as ``new_model`` makes it.

    Raises:
        CheckpointError: if the folder is incomplete or was changed.

    """
    verify_manifest(folder, SETUP_SCHEMA)
    processor = VlmixProcessor.from_pretrained(folder, local_files_only=True)
    config = VlmixConfig.from_pretrained(folder, local_files_only=True)
    return Setup(new_model(config, processor, seed), processor)


def stage_processor(processor: VlmixProcessor, stage: Stage) -> VlmixProcessor:
    """The processor as a stage wants it: with its own template and its own way to make pictures square."""
    if stage.chat_template is None and stage.fit is None:
        return processor
    changed, pictures = copy(processor), copy(processor.image_processor)
    if stage.chat_template is not None:
        changed.chat_template = _template(stage.chat_template)
    if stage.fit is not None:
        pictures.fit = stage.fit
    changed.image_processor = pictures
    return changed


def open_sources(stage: Stage) -> list[Source]:
    """The sources of a stage's mix, in order."""
    return [open_source(data.source) for data in stage.data]


def open_source(raw: dict[str, Any]) -> Source:
    """One source from its raw settings."""
    return SOURCES.get(raw["kind"])(read_part(SOURCES, raw))


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    settings = recipe.model.tokenizer
    if settings.weights is not None:
        with _readable("tokenizer", settings.weights):
            return AutoTokenizer.from_pretrained(settings.weights)
    training = settings.train or TokenizerTraining()
    return train_tokenizer(_texts(recipe, training.samples), training.vocab_size)


def _texts(recipe: Recipe, samples: int) -> Iterator[str]:
    """About ``samples`` conversations as the template writes them, shared among the recipe's sources."""
    raws = {json.dumps(data.source, sort_keys=True): data.source for s in recipe.stages for data in s.data}
    template, share = _template(recipe.model.chat_template), max(1, samples // len(raws))
    for raw in raws.values():
        source = open_source(raw)
        # Drawn at random: sources that take their tasks in turn would show an even stride only some of them.
        drawn = random.Random(recipe.seed).sample(range(len(source)), min(share, len(source)))
        for index in sorted(drawn):
            try:
                turns = source[index].turns
            except SampleError:
                continue  # training will quarantine this row with its reason
            yield prompt_text(render(template, turns, variables=CONTROL_TOKENS))


def _template(name_or_path: str) -> str:
    path = Path(name_or_path)
    return path.read_text(encoding="utf-8") if path.is_file() else load_template(name_or_path)


def _config(
    settings: ModelSettings,
    text_config: dict[str, Any],
    image_token_id: int,
    experts: Sequence[ExpertSettings] = (),
) -> VlmixConfig:
    return VlmixConfig(
        text_config=text_config,
        encoders=[{k: v for k, v in encoder.items() if k != "weights"} for encoder in settings.encoders],
        views=settings.views,
        fusion=settings.fusion,
        projector=settings.projector,
        image_size=settings.image_size,
        image_token_id=image_token_id,
        adapters=[adapter.model_dump() for adapter in settings.adapters] or None,
        experts=[mixture.model_dump(mode="json") for mixture in experts] or None,
    )


def _text_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The decoder's configuration; one from scratch is given the tokenizer's size and special tokens."""
    raw, size = settings.language_model, len(tokenizer)
    special = {f"{name}_token_id": tokenizer.get_vocab().get(token) for name, token in _special(tokenizer)}
    if "weights" in raw:
        # The image placeholder is never looked up, but a padding token that was added is.
        return _published_config(raw, 1 + (special["pad_token_id"] or 0))
    if raw.get("vocab_size", size) < size:
        raise RecipeError(
            f"model.language_model.vocab_size: {raw['vocab_size']} is less than the tokenizer's {size}; "
            "leave it out to take the tokenizer's"
        )
    return {"vocab_size": size, **special, **raw}


def _special(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    names = tokenizer.special_tokens_map
    return [(name, str(names[f"{name}_token"])) for name in ("bos", "eos", "pad") if f"{name}_token" in names]


def _published_config(raw: dict[str, Any], least_rows: int) -> dict[str, Any]:
    """The configuration that comes with the language model's weights, with at least ``least_rows`` tokens.

    Raises:
        CheckpointError: if it cannot be read, or is not the one the recipe says.

    """
    config = _published(raw["weights"])
    said, theirs = raw.get("config", {}), config.to_dict()
    ours = CONFIG_MAPPING[said["model_type"]](**said).to_dict() if said else {}
    compared = {"rope_parameters" if key.startswith("rope_") else key for key in said}
    wrong = [
        f"{key} is {theirs.get(key)!r}, in the recipe {ours[key]!r}"
        for key in sorted(compared)
        if theirs.get(key) != ours[key]
    ]
    if wrong:
        raise CheckpointError(
            f"language_model.weights {raw['weights']!r} are of another model than `config` says: "
            f"{'; '.join(wrong)}"
        )
    return {**theirs, "vocab_size": max(theirs["vocab_size"], least_rows)}


def _published(weights: str) -> PreTrainedConfig:
    with _readable("language_model", weights):
        return AutoConfig.from_pretrained(weights).get_text_config()


@contextmanager
def _readable(part: str, weights: str) -> Generator[None]:
    """Turn what transformers raises about an unreadable source into our own error."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{part}.weights {weights!r} cannot be read: {error} Give a folder that holds them, or a hub id "
            "this machine can reach."
        ) from error
