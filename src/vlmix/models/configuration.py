"""``VlmixConfig``: the parts of a model as data, and what they will produce, by arithmetic."""

from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmix.core.adapters import AdapterSettings
from vlmix.core.errors import PlanError, UnknownNameError
from vlmix.core.experts import ExpertSettings
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS, ROUTERS, VIEWS, read_part
from vlmix.core.resampling import EncoderSettings
from vlmix.core.settings import PartSettings, read_settings
from vlmix.core.tensors import VisionSpec
from vlmix.core.views import Tiling


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """What each encoder, the fusion and the projector will give for one view, and what becomes of a picture.

    ``encoders`` are the encoders' own maps; ``offered`` is what of them the fusion gets for one view, which
    differs for an encoder that sees the whole picture. ``views`` and ``tokens`` are those of a picture; where
    they vary with its shape, of one that takes the most. Behind the decoder layers ``inside`` fusion goes on.
    """

    encoders: tuple[VisionSpec, ...]
    offered: tuple[VisionSpec, ...]
    fused: VisionSpec
    projected: VisionSpec
    tiling: Tiling
    views: int
    tokens: int
    varies: bool
    inside: tuple[int, ...]


@strict
class VlmixConfig(PreTrainedConfig):
    """A model as a list of encoders, a fusion, a projector and a decoder of any kind transformers has.

    ``encoders``, ``views``, ``fusion`` and ``projector`` hold each part's settings with its ``kind``;
    ``text_config`` is the decoder's own configuration, or a dictionary with its ``model_type``;
    ``image_size`` is the side of the canonical square picture, or of a tile where ``views`` cut pictures
    into tiles; every encoder makes its own from it. ``experts`` are mixtures that replace feed-forward
    networks, in the order in which they are put in.
    """

    model_type = "vlmix"
    # A plain attribute works from transformers 5.17 on; later versions derive it from a newer one.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore
    has_no_defaults_at_init = False
    # Decoders bring their own; the default names layers that this model does not have.
    base_model_fsdp_plan = {}  # noqa: RUF012  # pyright: ignore

    text_config: dict | PreTrainedConfig | None = None
    encoders: list[dict[str, Any]] | None = None
    views: dict[str, Any] | None = None
    fusion: dict[str, Any] | None = None
    projector: dict[str, Any] | None = None
    image_size: int = 336
    image_token_id: int = 32000
    adapters: list[dict[str, Any]] | None = None
    experts: list[dict[str, Any]] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make ``text_config`` a configuration object; parts not given are those of LLaVA-1.5."""
        if self.text_config is None:
            self.text_config = {}
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "llama")
            if model_type not in CONFIG_MAPPING:
                raise UnknownNameError("language model type", model_type, CONFIG_MAPPING.keys())
            self.text_config = cast(
                "PreTrainedConfig",
                CONFIG_MAPPING[model_type](**{**self.text_config, "model_type": model_type}),
            )
        self.encoders = [dict(part) for part in self.encoders or [{"kind": "clip"}]]
        self.views = dict(self.views or {"kind": "whole"})
        self.fusion = dict(self.fusion or {"kind": "single"})
        self.projector = dict(self.projector or {"kind": "mlp"})
        self.tie_word_embeddings = bool(self.language.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @property
    def language(self) -> PreTrainedConfig:
        """The language model's own configuration."""
        return cast("PreTrainedConfig", self.text_config)

    @property
    def width(self) -> int:
        """Width of the language model's embeddings."""
        return int(self.language.hidden_size)

    def encoder_settings(self) -> list[EncoderSettings]:
        """Every encoder's settings, validated."""
        parts = [read_part(ENCODERS, raw, f"encoders.{i}") for i, raw in enumerate(self.encoders or [])]
        return cast("list[EncoderSettings]", parts)

    def view_settings(self) -> PartSettings:
        """The views' settings, validated."""
        return read_part(VIEWS, self.views or {}, "views")

    def fusion_settings(self) -> PartSettings:
        """The fusion's settings, validated."""
        return read_part(FUSIONS, self.fusion or {}, "fusion")

    def projector_settings(self) -> PartSettings:
        """The projector's settings, validated."""
        return read_part(PROJECTORS, self.projector or {}, "projector")

    def adapter_settings(self) -> list[AdapterSettings]:
        """Every adapter's settings, validated."""
        return [
            read_settings(AdapterSettings, raw, f"adapters.{i}") for i, raw in enumerate(self.adapters or [])
        ]

    def expert_settings(self) -> list[ExpertSettings]:
        """The settings of every mixture of experts, validated."""
        return [
            read_settings(ExpertSettings, raw, f"experts.{i}") for i, raw in enumerate(self.experts or [])
        ]

    @property
    def reads_instruction(self) -> bool:
        """Whether fusion or experts decide by what the user asked; the processor must then tell them."""
        fusion = self.fusion_settings()
        reads = FUSIONS.get(fusion.kind).instruction_width(fusion) is not None
        return reads or any(reads_instruction(settings) for settings in self.expert_settings())

    def plan(self) -> VisionPlan:
        """What every vision part will give for one image; makes no weight.

        Raises:
            PlanError: if the parts cannot work together.
            RecipeError: if a part's settings have an unknown key or value.

        """
        encoders = self.encoder_settings()
        if not encoders:
            raise PlanError("encoders: the list is empty; name at least one, such as {kind: clip}")
        fusion, projector, views = self.fusion_settings(), self.projector_settings(), self.view_settings()
        cut = VIEWS.get(views.kind)
        specs = tuple(ENCODERS.get(settings.kind).promise(settings) for settings in encoders)
        offered = tuple(
            cut.share(views, spec) if settings.sees == "picture" else spec
            for settings, spec in zip(encoders, specs, strict=True)
        )
        fused = FUSIONS.get(fusion.kind).plan(fusion, offered)
        projected = PROJECTORS.get(projector.kind).plan(projector, fused, self.width)
        tiling = cut.plan(views, projected)
        self._check_picture(encoders, views)
        self._check_instruction(fusion)
        return VisionPlan(
            encoders=specs,
            offered=offered,
            fused=fused,
            projected=projected,
            tiling=tiling,
            views=len(cut.boxes(views, tiling)),
            tokens=cut.tokens(views, tiling, projected.grid),
            varies=cut.varies,
            inside=self._inside(fused, projected),
        )

    def _inside(self, fused: VisionSpec, projected: VisionSpec) -> tuple[int, ...]:
        """Decoder layers behind which the fusion goes on."""
        settings = self.fusion_settings()
        found = FUSIONS.get(settings.kind).inside_decoder(settings)
        if found is None:
            return ()
        layers, width = found
        if width != self.width or fused.grid != projected.grid:
            raise PlanError(
                f"fusion.inside: made for a decoder {width} wide and tokens on the fusion's grid "
                f"{fused.grid}; this one is {self.width} wide and the projector gives {projected.grid}"
            )
        return layers

    @staticmethod
    def _check_picture(encoders: list[EncoderSettings], views: PartSettings) -> None:
        """Tilings that cut the picture itself have no whole picture at hand unless they are told its size."""
        seeing = [i for i, settings in enumerate(encoders) if settings.sees == "picture"]
        cut = VIEWS.get(views.kind)
        if seeing and cut.varies and cut.picture_size(views) is None:
            raise PlanError(
                f"views: encoders {seeing} see the whole picture; set `picture_size` to its side in pixels "
                f"(`{views.kind}` has none where its view is the whole picture: leave out `sees`)"
            )

    def _check_instruction(self, fusion: PartSettings) -> None:
        """The instruction is as wide as the decoder's embeddings, and has one row for each conversation."""
        width = FUSIONS.get(fusion.kind).instruction_width(fusion)
        if width not in (None, self.width):
            raise PlanError(
                f"{fusion.kind}: made for instructions {width} wide, but the decoder is {self.width} wide"
            )
        for settings in self.expert_settings():
            if settings.place != "language_model" and reads_instruction(settings):
                raise PlanError(
                    f"experts: in {settings.place} rows are pictures, not conversations, so a router cannot "
                    "read the instruction there. Take one that reads tokens"
                )

    @property
    def image_seq_length(self) -> int:
        """Visual tokens of a picture, or the most there can be where that varies with its shape."""
        return self.plan().tokens


def reads_instruction(settings: ExpertSettings) -> bool:
    """Whether the mixture's router decides by what the user asked."""
    return ROUTERS.get(settings.router["kind"]).reads == "instruction"


AutoConfig.register("vlmix", VlmixConfig, exist_ok=True)
