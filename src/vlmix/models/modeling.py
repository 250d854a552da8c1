"""encoders -> fusion -> projector -> language model, as a transformers v5 model.

Annotations here are evaluated, not postponed: transformers reads the config class from them.
Shape letters: see ``vlmix.core.tensors``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from vlmix.core.errors import ImageCountError
from vlmix.core.interfaces import Fusion, Part, Projector, VisionEncoder
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS
from vlmix.models.configuration import VlmixConfig

IGNORED = -100


@dataclass
class VlmixOutput(ModelOutput):
    """``loss`` over supervised tokens and ``logits`` (B, kept positions, vocabulary) of a forward pass."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class VlmixPreTrainedModel(PreTrainedModel):
    """What the two model classes share with transformers."""

    config_class = VlmixConfig
    config: VlmixConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """Save with the names the modules have.

        Transformers would otherwise write a loaded model in the names that its own older releases gave to
        models of the decoder's kind, so that loading and saving changes the file.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint gave, then let every part set its special values.

        Not through ``_init_weights``: transformers skips it for modules without parameters of their own.
        """
        super().initialize_weights()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Part):
                    module.reset()


class VlmixModel(VlmixPreTrainedModel):
    """The encoders, their fusion, the projector and the decoder; gives hidden states."""

    def __init__(self, config: VlmixConfig) -> None:
        super().__init__(config)
        plan = config.plan()
        encoders, fusion, projector = (
            config.encoder_settings(),
            config.fusion_settings(),
            config.projector_settings(),
        )
        self.encoders = nn.ModuleList([ENCODERS.get(part.kind)(part) for part in encoders])
        self.fusion: Fusion = FUSIONS.get(fusion.kind)(fusion, plan.encoders)
        self.projector: Projector = PROJECTORS.get(projector.kind)(projector, plan.fused, config.width)
        # The whole causal model, not its trunk: heads differ (bias, soft-capping, scale) and stay so.
        self.language_model: PreTrainedModel = AutoModelForCausalLM.from_config(config.language)
        self.image_seq_length = plan.tokens
        self.post_init()

    @property
    def decoder(self) -> PreTrainedModel:
        """The language model without its head."""
        return cast("PreTrainedModel", self.language_model.base_model)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Visual tokens (I, N, D) in ``pooler_output`` and the fused map before projection.

        ``pixel_values`` (I, 3, S, S) is the canonical image, float in 0..1 or uint8.
        """
        encoders = cast("Sequence[VisionEncoder]", list(self.encoders))
        fused = self.fusion(encoders, pixel_values)
        tokens_IND = self.projector(fused).tokens
        return BaseModelOutputWithPooling(last_hidden_state=fused.tokens, pooler_output=tokens_IND)

    def embed_inputs(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings (B, T, D) with each image placeholder replaced by its visual token.

        Raises:
            ImageCountError: if placeholders and visual tokens differ in number.

        """
        is_image_BT = input_ids == self.config.image_token_id
        # The placeholder needs no row of its own in the embedding table, so any decoder can be used as it is.
        embeds_BTD = self.get_input_embeddings()(input_ids.masked_fill(is_image_BT, 0))
        images = 0 if pixel_values is None else pixel_values.shape[0]
        self._check_count(is_image_BT, images)
        if pixel_values is None or images == 0:
            return embeds_BTD
        tokens_IND = self.get_image_features(pixel_values).pooler_output
        return embeds_BTD.masked_scatter(is_image_BT.unsqueeze(-1), cast("Tensor", tokens_IND).to(embeds_BTD))

    def _check_count(self, is_image_BT: Tensor, images: int) -> None:
        expected, found = images * self.image_seq_length, int(is_image_BT.sum())
        if found != expected:
            raise ImageCountError(
                f"the text holds {found} image placeholders, but {images} pictures of "
                f"{self.image_seq_length} visual tokens need {expected}. Pass text and pictures "
                "through the same VlmixProcessor, one <image> for each picture."
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the decoder's last layer (B, T, D)."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_inputs(cast("Tensor", input_ids), pixel_values)
        return self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class VlmixForConditionalGeneration(VlmixPreTrainedModel, GenerationMixin):
    """A model that reads pictures and text and writes text; an ordinary transformers model."""

    def __init__(self, config: VlmixConfig) -> None:
        super().__init__(config)
        self.model = VlmixModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head."""
        return cast("nn.Module", self.model.language_model.get_output_embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder's head."""
        self.model.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Visual tokens (I, N, D) in ``pooler_output``; see ``VlmixModel``."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | Literal["supervised"] = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> VlmixOutput:
        """Logits, and the loss where ``labels`` (B, T; -100 is ignored) are given.

        ``logits_to_keep`` limits the positions whose logits are computed: the last n, the given ones, or
        ``"supervised"``: those that predict a label in any row, which spares the head everywhere else.
        ``num_items_in_batch`` is what the summed loss is divided by: the supervised tokens of the whole
        optimizer step, across micro-batches and ranks; without it, those of this batch.

        Raises:
            ImageCountError: if placeholders and visual tokens differ in number.

        """
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_inputs(cast("Tensor", input_ids), pixel_values)
        if logits_to_keep == "supervised":
            logits_to_keep = _supervised_positions(labels)
        out = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = _next_token_loss(out.logits, labels, logits_to_keep, num_items_in_batch)
        return VlmixOutput(
            loss=loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the pictures over once: later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat each row's own pictures with it: rows hold different numbers of pictures."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(1)
            images = (placeholders // self.model.image_seq_length).tolist()
            rows = [part for part in pixel_values.split(images) for _ in range(expand_size)]
            pixel_values = torch.cat(rows)
        expand = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        expanded, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return expanded, {**model_kwargs, "pixel_values": pixel_values}


def _supervised_positions(labels: Tensor | None) -> Tensor:
    """Positions whose next token is a label in at least one row, and the last one if there is none."""
    if labels is None:
        raise ValueError("logits_to_keep='supervised' needs labels")
    kept = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
    return kept if kept.numel() else torch.tensor([labels.shape[1] - 1], device=labels.device)


def _next_token_loss(
    logits_BKV: Tensor, labels_BT: Tensor, kept: int | Tensor, items: Tensor | int | None
) -> Tensor:
    """Cross entropy of each kept position with the label after it, in float32, divided by ``items``."""
    after_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    if isinstance(kept, Tensor):
        after_BT = after_BT[:, kept]
    elif kept:
        after_BT = after_BT[:, -kept:]
    total = F.cross_entropy(
        logits_BKV.float().flatten(0, 1), after_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((after_BT != IGNORED).sum() if items is None else items)


AutoModel.register(VlmixConfig, VlmixModel, exist_ok=True)
AutoModelForImageTextToText.register(VlmixConfig, VlmixForConditionalGeneration, exist_ok=True)
