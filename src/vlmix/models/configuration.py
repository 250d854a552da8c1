"""``VlmixConfig``: the parts of a model as data, and what they will produce, by arithmetic."""

from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmix.core.errors import PlanError, UnknownNameError
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS, read_part
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import VisionSpec


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """What each encoder, the fusion and the projector will give for one image."""

    encoders: tuple[VisionSpec, ...]
    fused: VisionSpec
    projected: VisionSpec

    @property
    def tokens(self) -> int:
        """Visual tokens the language model sees per image."""
        return self.projected.tokens


@strict
class VlmixConfig(PreTrainedConfig):
    """A model as a list of encoders, a fusion, a projector and a decoder of any kind transformers has.

    ``encoders``, ``fusion`` and ``projector`` hold each part's settings with its ``kind``; ``text_config``
    is the decoder's own configuration, or a dictionary with its ``model_type``; ``image_size`` is the side
    of the canonical square picture, from which every encoder makes its own.
    """

    model_type = "vlmix"
    # A plain attribute works from transformers 5.17 on; later versions derive it from a newer one.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore
    has_no_defaults_at_init = False

    text_config: dict | PreTrainedConfig | None = None
    encoders: list[dict[str, Any]] | None = None
    fusion: dict[str, Any] | None = None
    projector: dict[str, Any] | None = None
    image_size: int = 336
    image_token_id: int = 32000
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

    def encoder_settings(self) -> list[PartSettings]:
        """Every encoder's settings, validated."""
        return [read_part(ENCODERS, raw, f"encoders.{i}") for i, raw in enumerate(self.encoders or [])]

    def fusion_settings(self) -> PartSettings:
        """The fusion's settings, validated."""
        return read_part(FUSIONS, self.fusion or {}, "fusion")

    def projector_settings(self) -> PartSettings:
        """The projector's settings, validated."""
        return read_part(PROJECTORS, self.projector or {}, "projector")

    def plan(self) -> VisionPlan:
        """What every vision part will give for one image; makes no weight.

        Raises:
            PlanError: if the parts cannot work together.
            RecipeError: if a part's settings have an unknown key or value.

        """
        encoders = self.encoder_settings()
        if not encoders:
            raise PlanError("encoders: the list is empty; name at least one, such as {kind: clip}")
        specs = tuple(ENCODERS.get(settings.kind).promise(settings) for settings in encoders)
        fusion, projector = self.fusion_settings(), self.projector_settings()
        fused = FUSIONS.get(fusion.kind).plan(fusion, specs)
        projected = PROJECTORS.get(projector.kind).plan(projector, fused, self.width)
        return VisionPlan(specs, fused, projected)

    @property
    def image_seq_length(self) -> int:
        """Visual tokens per image: the one number processor, model and plan agree on."""
        return self.plan().tokens


AutoConfig.register("vlmix", VlmixConfig, exist_ok=True)
