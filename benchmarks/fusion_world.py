"""The world of ``fusion_claims``: two small eyes that see different things, and what trains behind them.

The low eye sees a picture of 48 pixels as 12 x 12 colours, the high eye all 48 x 48 pixels in green light
alone. What stands in for published weights are three trainings that never meet: each eye before a decoder of
its own that is thrown away, and the decoder behind an eye of its own, which sees all and is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from vlmix.core.files import publish
from vlmix.core.sample import Sample
from vlmix.core.settings import read_settings
from vlmix.data.sources.synth import Synth, SynthSettings
from vlmix.data.synth.drawing import COLOURS, SHAPES
from vlmix.evals.benchmarks.synth_qa import HELD_OUT_SEED
from vlmix.models.plan import plan_model
from vlmix.models.processing import VlmixProcessor
from vlmix.train.build import Setup, build, recipe_config
from vlmix.train.optim import build_optimizer, rate_factor, set_rates
from vlmix.train.order import DataOrder
from vlmix.train.recipe import Recipe
from vlmix.train.solo import running
from vlmix.train.trainable import select, set_modes

KINDS: Final = ("colour", "shape", "number", "word")
SIDE, BATCH, WIDTH, LOW_WIDTH, AT_ONCE = 48, 32, 64, 64, 100
Start = Literal["low", "high", "decoder"]
START_SEED: Final = 1000
STARTS: Final[tuple[Start, ...]] = ("low", "high", "decoder")
EYES: Final = ("low", "high")
# Each reads the high eye as `recipes/fusions` does: the last stage, or finer ones where the fusion looks for
# places in them. Heads are four throughout; the other numbers are each fusion's own defaults, shrunk.
FUSIONS: Final[Mapping[str, dict[str, Any]]] = {
    "low alone": {"kind": "single"},
    "high alone": {"kind": "single"},
    "sequence_append": {"kind": "sequence_append", "width": LOW_WIDTH},
    "channel_concat": {"kind": "channel_concat"},
    "mixture_of_resolution": {"kind": "mixture_of_resolution", "after": [1]},
    "patch_mining": {"kind": "patch_mining", "heads": 4},
    "deformable": {"kind": "deformable", "heads": 4},
    "spatial_aggregator": {"kind": "spatial_aggregator", "grid": [3, 3], "width": LOW_WIDTH, "heads": 4}
    | {"depth": 1},
}
FINER: Final = ("patch_mining", "deformable", "spatial_aggregator")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Optimizer steps of each part and learning rates.

    ``low``, ``high`` and ``decoder`` are those of what stands in for published weights. ``alone`` steps align
    one eye, so that two eyes take twice as many; a run without alignment trains for so many steps longer.
    ``eye_rate`` is that of eyes wherever they train after the start, ``rate`` that of all else.
    """

    low: int = 400
    high: int = 1000
    decoder: int = 1200
    alone: int = 50
    join: int = 30
    answer: int = 100
    pictures: int = 300
    start_rate: float = 2e-3
    rate: float = 2e-3
    eye_rate: float = 3e-4

    @property
    def digest(self) -> str:
        """Tells results of other settings apart."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def started(self) -> str:
        """Tells what stands in for published weights apart."""
        return f"{self.low}-{self.high}-{self.decoder}-{self.start_rate:g}"


@dataclass(frozen=True, slots=True)
class Arm:
    """One training: which eyes, joined how, and whether they train and were aligned."""

    fusion: str
    unfrozen: bool
    aligned: bool

    @property
    def name(self) -> str:
        """A line of the table."""
        eyes = "unfrozen" if self.unfrozen else "frozen"
        return f"{self.fusion}, {eyes}, {'aligned' if self.aligned else 'not aligned'}"

    @property
    def eyes(self) -> tuple[str, ...]:
        """The eyes in it."""
        alone = self.fusion.removesuffix(" alone")
        return EYES if alone == self.fusion else (alone,)


ARMS: Final = tuple(
    Arm(fusion, unfrozen, aligned)
    for unfrozen, aligned in ((True, False), (False, False), (True, True), (False, True))
    for fusion in FUSIONS
)


def eye(name: str, stages: Sequence[int] = (2,)) -> dict[str, Any]:
    """Settings of the low eye, the high one, or the thrown-away one that sees all a picture has."""
    if name == "low":
        tower = {"kind": "clip", "image_size": 12, "patch_size": 4, "width": LOW_WIDTH, "layers": 2}
        tower |= {"heads": 4, "mlp": 128, "feature_layer": -1, "activation": "gelu"}
        return tower | {"mean": [0.94] * 3, "std": [0.27] * 3}
    tower = {"kind": "convnext", "image_size": SIDE, "depths": [1, 1, 2, 1], "widths": [32, 64, 96, 128]}
    tower |= {"stages": list(stages), "layer_scale": 1.0, "mean": [0.94] * 3}
    return tower | {"std": [1e6, 0.27, 1e6] if name == "high" else [0.27] * 3}


def recipe(seed: int, arm: Arm | Start, sizes: Sizes, tokenizer: Path | None) -> Recipe:
    """The model and the stages of one training; without ``tokenizer`` one is made from the data."""
    if isinstance(arm, Arm):
        finer = (1, 2) if arm.fusion in FINER else (2,)
        eyes = [eye(name, finer) for name in arm.eyes]
        fusion, stages = FUSIONS[arm.fusion], stages_of(seed, arm, sizes)
    else:
        eyes, fusion = [eye(arm)], FUSIONS["low alone"]
        # Rows are each training's own.
        rows, steps = sheets(seed, 10 + STARTS.index(arm)), asdict(sizes)[arm]
        stages = [stage("look", {"*": sizes.start_rate}, rows, steps)]
    decoder = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder |= {"num_key_value_heads": 4, "intermediate_size": 2 * WIDTH, "max_position_embeddings": 128}
    made = {"train": {"vocab_size": 400, "samples": 1500}}
    words = made if tokenizer is None else {"weights": str(tokenizer)}
    return read_settings(
        Recipe,
        {
            "name": "fusion_claims",
            "seed": seed,
            "model": {
                "image_size": SIDE,
                "encoders": eyes,
                "fusion": fusion,
                "projector": {"kind": "mlp"},
                "language_model": decoder | {"tie_word_embeddings": True, "initializer_range": 0.08},
                "tokenizer": words,
                "chat_template": "mistral",
                "max_length": 128,
            },
            "stages": stages,
        },
    )


def stages_of(seed: int, arm: Arm, sizes: Sizes) -> list[dict[str, Any]]:
    """Each eye alone before the frozen decoder where it is aligned; then the fresh parts; then the rest.

    All arms see as many batches; what one does not spend on alignment it spends in the last stage.
    """
    rest = {"projector.*": sizes.rate}
    if arm.fusion in ("mixture_of_resolution", "sequence_append", *FINER):
        rest["fusion.*"] = sizes.rate
    answers = sheets(seed, 2)
    alone = [
        {"solo": {"encoder": n, "projector": {"kind": "mlp"}}}
        | stage(name, {f"encoders.{n}.*": sizes.eye_rate, "projector.*": sizes.rate}, answers, sizes.alone)
        for n, name in enumerate(arm.eyes)
    ]
    spent = len(alone) * sizes.alone if arm.aligned else 0
    train = rest | {"language_model.*": sizes.rate}
    train |= {"encoders.*": sizes.eye_rate} if arm.unfrozen else {}
    left = sizes.answer + len(EYES) * sizes.alone - spent
    found = [stage("join", rest, sheets(seed, 1), sizes.join), stage("answer", train, answers, left)]
    return [*alone, *found] if arm.aligned else found


def stage(name: str, train: Mapping[str, float], source: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """One stage of a recipe."""
    told = {"name": name, "train": dict(train), "data": [{"source": source}], "batch_size": BATCH}
    told |= {"optimizer": {"betas": [0.9, 0.98], "weight_decay": 0.05}}
    return told | {"steps": steps, "schedule": {"warmup_steps": 20, "floor": 0.1}}


def sheets(seed: int, part: int) -> dict[str, Any]:
    """Rows that no other seed and no other part has: up to nine things, numbers and words to be read."""
    told = {"kind": "synth", "image_size": SIDE, "difficulty": 0, "noise": 0, "tasks": ["mosaic"]}
    return told | {"size": 200_000, "seed": 1 + 100 * seed + part}


class World:
    """One seed of one folder; pictures and words are made once for all its trainings.

    What stands in for published weights is the same for all seeds.
    """

    def __init__(self, seed: int, sizes: Sizes, folder: Path) -> None:
        self.seed, self.sizes = seed, sizes
        self.starts = folder / "starts" / sizes.started
        told = f"{sizes.alone}-{sizes.eye_rate:g}-{sizes.rate:g}"
        self.aligned = folder / "aligned" / f"{sizes.started}-{told}-{seed}"
        self._samples: dict[str, Sample] = {}
        self._batches: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def start(self, what: Start) -> None:
        """Make what stands in for published weights, unless it is there."""
        target = self.starts / what
        if target.is_dir():
            return
        made = recipe(self.seed, what, self.sizes, self.tokenizer)
        setup = build(made)
        self.learn(setup, made, 0)
        inner = setup.model.model
        _keep(inner.language_model if what == "decoder" else inner.encoders[0], target)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.starts / "tokenizer"

    def make_tokenizer(self) -> None:
        """Make the tokenizer, unless it is there."""
        if not self.tokenizer.is_dir():
            words = build(recipe(self.seed, "decoder", self.sizes, None)).processor.tokenizer
            with publish(self.tokenizer) as new:
                words.save_pretrained(new)

    def align(self, name: str) -> None:
        """Train one eye alone before the frozen decoder, unless that is done."""
        if (self.aligned / name).is_dir():
            return
        setup, made = self._setup(Arm(f"{name} alone", unfrozen=False, aligned=True), self.starts)
        self.learn(setup, made, 0)
        _keep(setup.model.model.encoders[0], self.aligned / name)

    def train(self, arm: Arm) -> dict[str, Any]:
        """Train one arm to its end: which words it reads right, and what a step took."""
        began = time.process_time()
        setup, made = self._setup(arm, self.aligned if arm.aligned else self.starts)
        seconds: list[float] = []
        for index, each in enumerate(made.stages):
            if each.solo is None:
                seconds = self.learn(setup, made, index)
        row = {"seed": self.seed, "arm": arm.name, "settings": self.sizes.digest}
        row |= self.judge(setup)
        row |= {"step_seconds": statistics.median(seconds), "eye_rate": self.sizes.eye_rate}
        return row | {"cpu_seconds": time.process_time() - began}

    def learn(self, setup: Setup, made: Recipe, index: int) -> list[float]:
        """Train one stage; CPU seconds of every step."""
        given = made.stages[index]
        # Stages of the same name have the same order in all arms, whatever came before.
        place = ("look", "join", "answer").index(given.name) if given.solo is None else 3
        ran = running(setup, given, (self.seed, place))
        torch.manual_seed(1000 * self.seed + place)
        source, selection = _painter(given.data[0].source), select(ran.model, given.train)
        optimizer = build_optimizer(selection, given.optimizer, ran.model)
        order = DataOrder.plan(
            [len(source)], [None], given.batch_size, (self.seed, place), steps=given.steps, epochs=None
        )
        set_modes(ran.model)
        seconds: list[float] = []
        for step in range(order.steps):
            batch = self._batch(source, [row.row for row in order.rows_for_step(step)], ran.processor)
            began = time.process_time()
            items = int((batch["labels"][:, 1:] != -100).sum())
            told = {"logits_to_keep": "supervised", "num_items_in_batch": items, "use_cache": False}
            output = ran.model(**batch, **told)
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            clip_grad_norm_([p for p in selection.parameters.values() if p.grad is not None], 1.0)
            set_rates(optimizer, rate_factor(given.schedule, step, order.steps))
            optimizer.step()
            seconds.append(time.process_time() - began)
        return seconds

    def judge(self, setup: Setup) -> dict[str, str]:
        """Which words of held-out sheets are read right, and of what kind they are, sheet by sheet.

        Each is asked for behind the true ones before it, and right if the likeliest pieces are its.
        """
        source = _painter(sheets(0, 0) | {"seed": HELD_OUT_SEED + self.seed})
        right, kinds = list[str](), list[str]()
        setup.model.eval()
        for first in range(0, self.sizes.pictures, AT_ONCE):
            rows = range(first, min(first + AT_ONCE, self.sizes.pictures))
            batch = self._batch(source, rows, setup.processor)
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                said = setup.model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
            for wanted, given in zip(labels, said, strict=True):
                shown = wanted != -100
                read = judged(wanted[shown].tolist(), given[shown].tolist(), setup.processor.tokenizer)
                right.append("".join(str(int(hit)) for _, hit in read))
                kinds.append("".join(str(KINDS.index(kind)) for kind, _ in read))
        return {"right": " ".join(right), "kinds": " ".join(kinds)}

    def _setup(self, arm: Arm, eyes: Path) -> tuple[Setup, Recipe]:
        """A model with fresh fusion and projector between the decoder and the eyes in a folder."""
        made = recipe(self.seed, arm, self.sizes, self.tokenizer)
        setup = build(made)
        inner = setup.model.model
        _fill(inner.language_model, self.starts / "decoder")
        for number, name in enumerate(arm.eyes):
            _fill(inner.encoders[number], eyes / name)
        return setup, made

    def _batch(self, source: Synth, rows: Sequence[int], processor: VlmixProcessor) -> dict[str, Tensor]:
        key = (source.settings.seed, processor.image_seq_length, *rows)
        if key not in self._batches:
            encoded = [processor.encode(self._painted(source, row), supervise=True) for row in rows]
            opened = [processor.open_images(each) for each in encoded]
            self._batches[key] = dict(processor.collate(encoded, opened=opened))
        return dict(self._batches[key])

    def _painted(self, source: Synth, row: int) -> Sample:
        name = f"{source.settings.seed}-{row}"
        if name not in self._samples:
            self._samples[name] = source[row]
        return self._samples[name]


def judged(wanted: Sequence[int], given: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """The kind of every word, and whether all its pieces were given."""
    found = [("", True)]
    for piece, other in zip(wanted, given, strict=True):
        shown = tokenizer.decode([piece], skip_special_tokens=True)
        if not shown[:1].isalnum():
            found.append(("", True))
        if any(letter.isalnum() for letter in shown):
            found[-1] = found[-1][0] + shown.strip(" ,"), found[-1][1] and piece == other
    return [(_kind(word), hit) for word, hit in found if word]


def _kind(word: str) -> str:
    named = "colour" if word in COLOURS else "shape" if word in SHAPES else "word"
    return "number" if word.isdigit() else named


def cost(arm: Arm, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Tokens, parameters and multiply-adds of one arm, counted on shapes."""
    made = recipe(0, arm, sizes, World(0, sizes, folder).tokenizer)
    found = plan_model(recipe_config(made), text_tokens=24, dtype=torch.float32)
    fresh = sum(part.parameters for part in found.parts if part.name.startswith(("fusion", "projector")))
    eyes = sum(part.parameters for part in found.parts if part.name.startswith("encoders"))
    told = {"visual_tokens": found.vision.tokens, "fresh_parameters": fresh, "eye_parameters": eyes}
    return told | {"parameters": found.parameters, "multiply_adds": found.prefill_flops // 2}


@lru_cache(maxsize=1)
def world(seed: int, sizes: Sizes, folder: Path) -> World:
    """The world that the trainings of one process share."""
    return World(seed, sizes, folder)


def words(sizes: Sizes, folder: Path) -> None:
    """Make the tokenizer."""
    world(START_SEED, sizes, folder).make_tokenizer()


def start(what: Start, sizes: Sizes, folder: Path) -> None:
    """Make one of what stands in for published weights."""
    world(START_SEED, sizes, folder).start(what)


def align(name: str, seed: int, sizes: Sizes, folder: Path) -> None:
    """Train one eye alone."""
    world(seed, sizes, folder).align(name)


def train(arm: Arm, seed: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Train and judge one arm."""
    return world(seed, sizes, folder).train(arm)


def _fill(module: nn.Module, folder: Path) -> None:
    module.load_state_dict(load_file(folder / "weights.safetensors"))


def _keep(module: nn.Module, folder: Path) -> None:
    with publish(folder) as new:
        tensors = {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
        save_file(tensors, new / "weights.safetensors")


def _painter(source: Mapping[str, Any]) -> Synth:
    return Synth(SynthSettings.model_validate(source))
