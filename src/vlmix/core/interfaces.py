"""What each kind of part owes. Every class here is abstract; every class that inherits from one is final.

To change one method of a part, wrap the part instead of inheriting from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmix.core.errors import CheckpointError
from vlmix.core.initial import fan_in
from vlmix.core.sample import Answer, Decoding, Responder, Sample, Score
from vlmix.core.settings import PartSettings, paths_in
from vlmix.core.tensors import FeatureMap, Routing, TextContext, VisionSpec


class Part(nn.Module, ABC):
    """A piece of the model, built from its settings."""

    settings_class: ClassVar[type[PartSettings]]

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """Names of parameters that no output depends on, kept so that published weights have a place.

        Every other parameter of a part gets a gradient; the conformance suite checks both.
        """
        return ()

    @property
    def past_linears(self) -> tuple[str, ...]:
        """Names of Linears whose weights are read without calling them: an adapter there would do nothing."""
        return ()

    def reset(self) -> None:
        """Give special initial values to this part's own parameters and buffers.

        Called after generic initialisation, on a new model and on a loaded one. Use the functions of
        ``transformers.initialization`` here: they leave weights that came from a checkpoint alone. Do not
        rely on values set in ``__init__``: generic initialisation overwrites them, and models are loaded on
        the meta device, where buffers that are not saved come out as garbage.
        """


class VisionEncoder(Part):
    """Pixels in 0..1 -> feature map, whole or block by block for fusions inside the backbone."""

    spec: VisionSpec
    weights: str | None = None

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.spec, self.resample = self.plan(settings), settings.resample

    @classmethod
    def promise(cls, settings: Any) -> VisionSpec:
        """What ``forward`` will give for one image: the map of ``plan``, resampled where the settings say so.

        Raises:
            PlanError: if the settings cannot work together.

        """
        spec = cls.plan(settings)
        return spec if settings.resample is None else settings.resample.plan(spec)

    @classmethod
    @abstractmethod
    def plan(cls, settings: Any) -> VisionSpec:
        """What ``finish`` will give for one image; pure arithmetic.

        Raises:
            PlanError: if the settings cannot work together.

        """

    @abstractmethod
    def embed(self, pixel_values: Float[Tensor, "i 3 s s"]) -> Tensor:
        """Resize and normalise the canonical image for this encoder, and run the stem."""

    @abstractmethod
    def block(self, index: int, x: Tensor) -> Tensor:
        """Run block ``index`` of ``spec.blocks`` on what ``embed`` or the block before returned."""

    @abstractmethod
    def finish(self, x: Tensor) -> FeatureMap:
        """Turn the last block's output into the feature map that ``plan`` promised."""

    def load_weights(self, source: str) -> None:
        """Load published weights from a hub id or folder into this encoder.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape.

        """
        raise CheckpointError(f"{type(self).__name__} has no published weights to load from {source!r}")

    def forward(self, pixel_values: Float[Tensor, "i 3 s s"]) -> FeatureMap:
        """Embed, every block, finish, resample."""
        x = self.embed(pixel_values)
        for index in range(self.spec.blocks):
            x = self.block(index, x)
        return self.finish(x) if self.resample is None else self.resample.apply(self.finish(x))

    def levels(self, pixel_values: Float[Tensor, "i 3 s s"]) -> list[FeatureMap]:
        """The scales that ``promise`` names in ``levels``, each on its own grid; else the map alone."""
        return [self(pixel_values)]


class Fusion(Part):
    """Several encoders -> one feature map. Built from its settings and the encoders' specs.

    One that ``reads_masks`` is told which cells of its encoders' maps are padding.
    """

    reads_masks: ClassVar[bool] = False

    def reset(self) -> None:
        """Start from weights that keep the size of what passes through, at any width."""
        fan_in(self)

    @classmethod
    @abstractmethod
    def plan(cls, settings: Any, specs: Sequence[VisionSpec]) -> VisionSpec:
        """What ``forward`` will give for one image; pure arithmetic.

        Raises:
            PlanError: if these encoders cannot be fused so.

        """

    @classmethod
    def warnings(cls, settings: Any, specs: Sequence[VisionSpec]) -> list[str]:
        """What works with these encoders, but hardly as it was meant; ``plan`` has accepted them before."""
        return []

    @abstractmethod
    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Float[Tensor, "i 3 s s"],
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run the encoders on the canonical images and fuse what they see.

        ``context`` has one token a row: what the user asked, for every image.
        """

    @classmethod
    def instruction_width(cls, settings: Any) -> int | None:
        """Width of the instruction that ``forward`` reads in its context, if it reads one."""
        return None

    @classmethod
    def inside_decoder(cls, settings: Any) -> tuple[tuple[int, ...], int] | None:
        """Decoder layers, from 0, behind which ``refine`` sees visual tokens again; the decoder's width."""
        return None

    def refine(
        self, place: int, tokens_ND: Float[Tensor, "n d"], memory: Any, cells_N: Tensor | None
    ) -> Float[Tensor, "n d"]:
        """Visual tokens behind the layer at ``place`` in ``inside_decoder`` -> the same tokens, refined.

        ``memory`` is that of the map ``forward`` gave; ``cells_N`` are the tokens' cells in it, counted over
        all views, or ``None`` for all in order.
        """
        raise TypeError(f"{type(self).__name__} does nothing inside the decoder")


class LateFusion(Fusion):
    """Fusion of finished maps: implement ``merge`` only."""

    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Float[Tensor, "i 3 s s"],
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run every encoder whole, then merge."""
        return self.merge([encoder(pixel_values) for encoder in encoders], context)

    @abstractmethod
    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Fuse the encoders' maps."""


class Projector(Part):
    """Fused map -> tokens of the language model's width. Built from settings, spec and width."""

    def reset(self) -> None:
        """Start from weights that keep the size of what passes through, at any width."""
        fan_in(self)

    @classmethod
    @abstractmethod
    def plan(cls, settings: Any, spec: VisionSpec, width: int) -> VisionSpec:
        """What ``forward`` will give for one image; pure arithmetic.

        Raises:
            PlanError: if the map has no shape this projector can take.

        """

    @abstractmethod
    def forward(self, features: FeatureMap) -> FeatureMap:
        """Map every token to the language model's width."""


class Router(Part):
    """Decides which experts see what. Built from its settings, the width of what it reads and their number.

    One that is not ``causal`` looks at other tokens to decide about one, so it has no place in a decoder. One
    that ``reads`` the instruction decides once for each row of the batch. One that is not ``rowwise`` lets
    rows of the batch compete. One that ``mixes`` gives experts mixtures of tokens to read.
    """

    causal: ClassVar[bool] = True
    reads: ClassVar[Literal["tokens", "instruction"]] = "tokens"
    rowwise: ClassVar[bool] = True
    mixes: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def plan(cls, settings: Any, experts: int) -> None:
        """Refuse settings that do not fit this number of experts.

        Raises:
            PlanError: with the setting and the number.

        """

    @classmethod
    def met(cls, settings: Any, experts: int) -> int:
        """How many of the experts one token meets, on average."""
        return settings.k

    @abstractmethod
    def forward(self, x_BTD: Float[Tensor, "b t d"]) -> Routing:
        """Decide for every token; the scores are computed in float32 whatever the tokens are."""

    @torch.no_grad()
    def rebalance(self, load_E: Float[Tensor, " e"], rate: float) -> None:
        """After an optimizer step whose tokens chose experts ``load_E`` times: for routers with a bias."""


class Source(ABC):
    """A training set: samples by number, so that data order is a pure function of seed, epoch and step."""

    settings_class: ClassVar[type[PartSettings]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def __len__(self) -> int:
        """Rows of the set, bad ones included: ``read = used + quarantined`` counts against this."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Row ``index``, the same on every call.

        Raises:
            SampleError: if the row cannot be used; it is quarantined, never replaced.

        """

    @classmethod
    @abstractmethod
    def tiny(cls, folder: Path) -> Any:
        """Write a few rows under ``folder`` where files are needed, and return settings that read them."""

    @classmethod
    def places(cls, settings: Any) -> list[Path]:
        """Files and folders that must be there for a source with these settings; none is opened."""
        return list(paths_in(settings))

    def line(self, index: int) -> int:
        """Where row ``index`` stands in its file, counted from 1; the ledger names it."""
        return index + 1

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class Benchmark(ABC):
    """A set of questions, how one answer is scored, and the official formula that sums up.

    ``headline`` is the figure that stands for all. ``units`` names the figures that are no share of 1, with
    the unit they are in. ``protocol`` is the rule by which answers are scored, with its ``source``, where
    there are several; ``note`` is what a reader of its figures has to know. Where ``canned`` is not set,
    answers made elsewhere cannot be judged: more than answers is asked.
    """

    settings_class: ClassVar[type[PartSettings]]
    headline: str
    protocol: str = ""
    source: str = ""
    note: str = ""
    paper: ClassVar[str] = ""
    units: Mapping[str, str] = {}
    canned: ClassVar[bool] = True

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def unit(self, figure: str) -> str:
        """The unit of a figure; empty for a share of 1."""
        return self.units.get(figure, "")

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """The questions with their targets; the same, in the same order, on every call."""

    def ask(self, responder: Responder, samples: Sequence[Sample], decoding: Decoding) -> Iterable[Answer]:
        """Ask these samples, which carry no target, and give one answer each, in order."""
        return responder.respond(samples, decoding)

    @abstractmethod
    def score(self, sample: Sample, answer: Answer) -> Score:
        """Judge one answer; a failed answer scores 0 and stays in the denominator."""

    def judge(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Score]:
        """Judge all answers, in order: for rules under which questions depend on one another."""
        return [self.score(sample, answer) for sample, answer in zip(samples, answers, strict=True)]

    @abstractmethod
    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The benchmark's figures by name, shares of 1 unless ``units`` says otherwise; has ``headline``.

        Order does not matter, and any part of the scores can be summed up, if whole groups are in it.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, folder: Path) -> Self:
        """A few questions, written under ``folder`` where files are needed."""
