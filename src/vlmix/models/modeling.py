"""encoders -> fusion -> projector -> language model, as a transformers v5 model.

Annotations here are evaluated, not postponed: transformers reads the config class from them.
Shape letters: see ``vlmix.core.tensors``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
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
from vlmix.core.interfaces import Fusion, Projector
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS
from vlmix.core.tape import recording
from vlmix.core.tensors import Routing, TextContext
from vlmix.core.views import Tiling, Views
from vlmix.models.adapters import install_adapters
from vlmix.models.configuration import VlmixConfig
from vlmix.models.features import shown_to
from vlmix.models.instruction import asked, picture_context, row_context
from vlmix.models.losses import answer_loss, has_plain_head, supervised_positions, supervised_share
from vlmix.models.mixtures import auxiliary_loss, install_mixtures
from vlmix.models.packing import packed_row
from vlmix.models.pretrained import VlmixPreTrainedModel
from vlmix.models.revisit import REVISIT, Revisit, revisit_layers
from vlmix.models.unseen import nothing_of
from vlmix.models.viewing import Sight, Viewing, pictures_of_rows
from vlmix.moe.balance import Positions, RoutingCounts
from vlmix.moe.parallel import plan_experts

_KEPT = ("logits", "past_key_values", "hidden_states", "attentions")
Pictures = tuple[Tensor | None, Tensor | None, Tensor | None]
_PICTURES = ("pixel_values", "image_tilings", "picture_values")


@dataclass
class VlmixOutput(ModelOutput):
    """``loss`` over supervised tokens and ``logits`` (B, kept positions, vocabulary) of a forward pass.

    ``aux_loss`` is the part of ``loss`` that balances experts; ``routing`` is what each expert layer decided.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None


class VlmixModel(VlmixPreTrainedModel):
    """The encoders, their fusion, the projector and the decoder; gives hidden states."""

    def __init__(self, config: VlmixConfig) -> None:
        super().__init__(config)
        plan = config.plan()
        fusion, projector = config.fusion_settings(), config.projector_settings()
        self.viewing = Viewing(config, plan)
        self.encoders = nn.ModuleList([ENCODERS.get(part.kind)(part) for part in config.encoder_settings()])
        self.views: Views = self.viewing.views(self.viewing.settings, plan.projected)
        self.fusion: Fusion = FUSIONS.get(fusion.kind)(fusion, plan.offered)
        self.projector: Projector = PROJECTORS.get(projector.kind)(projector, plan.fused, config.width)
        # The whole causal model, not its trunk: heads differ (bias, soft-capping, scale) and stay so.
        self.language_model: PreTrainedModel = AutoModelForCausalLM.from_config(config.language)
        self.image_seq_length = plan.tokens
        self.revisits = plan.inside
        self.packs_with: str | None = None  # the attention with which packed rows were tried
        revisit_layers(self.decoder, plan.inside)
        install_mixtures(self, config)
        plan_experts(self.language_model)
        install_adapters(self, self.language_model.get_output_embeddings(), config.adapter_settings())
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

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_tilings: Tensor | None = None,
        picture_values: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens in ``pooler_output``: (I, N, D), or one (N, D) a picture where their numbers vary.

        ``last_hidden_state`` is the fused map of every view before projection. ``pixel_values`` (I, 3, S, S)
        are the canonical pictures, float in 0..1 or uint8, or, with views that vary, the views of all
        pictures, ``image_tilings`` (I, 4) telling how each was cut. ``picture_values`` are then whole
        pictures, for encoders that see them. ``instruction_ids`` are one row for each picture, or for all.

        Raises:
            ImageCountError: if pixels, tilings and whole pictures do not belong together.

        """
        tilings = self.viewing.tilings(pixel_values, image_tilings)
        with asked(self.get_input_embeddings(), instruction_ids, instruction_mask):
            context = picture_context(self.viewing.counts(tilings))
        seen = self.see(pixel_values, picture_values, tilings, context)
        found: Any = seen.tokens.unflatten(0, (len(tilings), -1)) if not self.viewing.plan.varies else None
        if found is None:
            found = seen.tokens.split(self.viewing.tokens(tilings))
        return BaseModelOutputWithPooling(last_hidden_state=seen.fused.tokens, pooler_output=found)

    def see(
        self,
        pixel_values: Tensor,
        picture_values: Tensor | None,
        tilings: Sequence[Tiling],
        context: TextContext | None = None,
    ) -> Sight:
        """Run encoders, fusion and projector on every view of pictures cut as ``tilings`` say."""
        pictures = picture_values if self.viewing.plan.varies else pixel_values
        encoders, views, pictures = shown_to(self.encoders, self.views, pixel_values, pictures)
        shown = self.viewing.scoped(encoders, pictures, tilings, masked=self.fusion.reads_masks)
        fused = self.fusion(shown, views, context)
        projected = self.projector(fused)
        order_N = self.viewing.order(tilings, projected.tokens.device)
        return Sight(fused, self.views.join(projected.tokens, order_N), order_N)

    def embed_inputs(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        image_tilings: Tensor | None = None,
        picture_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Revisit]]:
        """Token embeddings (B, T, D) with each image placeholder replaced by its visual token.

        ``inputs_embeds`` are taken as they are where they are given. The second holds what fusions that go on
        inside the decoder need there: arguments for it.

        Raises:
            ImageCountError: if placeholders and visual tokens differ in number.

        """
        if inputs_embeds is not None:
            return inputs_embeds, {}
        input_ids = cast("Tensor", input_ids)
        is_image_BT = input_ids == self.config.image_token_id
        # The placeholder needs no row of its own in the embedding table, so any decoder can be used as it is.
        embeds_BTD = self.get_input_embeddings()(input_ids.masked_fill(is_image_BT, 0))
        if pixel_values is None or pixel_values.shape[0] == 0:
            self._check_count(is_image_BT, [])
            return embeds_BTD, {}
        tilings = self.viewing.tilings(pixel_values, image_tilings)
        tokens = self.viewing.tokens(tilings)
        self._check_count(is_image_BT, tokens)
        context = row_context(is_image_BT, tokens, self.viewing.counts(tilings))
        seen = self.see(pixel_values, picture_values, tilings, context)
        embeds_BTD = embeds_BTD.masked_scatter(is_image_BT.unsqueeze(-1), seen.tokens.to(embeds_BTD))
        again = {REVISIT: Revisit(self.fusion, seen.fused.memory, is_image_BT, seen.order)}
        return embeds_BTD, again if self.revisits else {}

    def _check_count(self, is_image_BT: Tensor, tokens: Sequence[int]) -> None:
        expected, found = sum(tokens), int(is_image_BT.sum())
        if found != expected:
            each = " and ".join(map(str, sorted({*tokens}))) or str(self.image_seq_length)
            raise ImageCountError(
                f"the text holds {found} image placeholders, but {len(tokens)} pictures of "
                f"{each} visual tokens need {expected}. Pass text and pictures "
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
        image_tilings: Tensor | None = None,
        picture_values: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        document_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the decoder's last layer (B, T, D)."""
        with asked(self.get_input_embeddings(), instruction_ids, instruction_mask):
            pictures = (pixel_values, image_tilings, picture_values)
            embeds_BTD, again = self.embed_inputs(input_ids, *pictures, inputs_embeds)
            with packed_row(self, document_lengths, position_ids, attention_mask) as row:
                return self.decoder(
                    inputs_embeds=embeds_BTD,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    **kwargs | again | row,
                )


class VlmixForConditionalGeneration(VlmixPreTrainedModel, GenerationMixin):
    """A model that reads pictures and text and writes text; an ordinary transformers model."""

    def __init__(self, config: VlmixConfig) -> None:
        super().__init__(config)
        self.model = VlmixModel(config)
        self._tried_head: tuple[nn.Module, bool] | None = None
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
        """Visual tokens in ``pooler_output``; see ``VlmixModel``."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_tilings: Tensor | None = None,
        picture_values: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | Literal["supervised"] = 0,
        num_items_in_batch: Tensor | int | None = None,
        routing_counts: RoutingCounts | None = None,
        document_lengths: Tensor | None = None,
        fused_loss: bool = False,
        unseen_pictures: bool = False,
        **kwargs: Any,
    ) -> VlmixOutput:
        """Logits, and the loss where ``labels`` (B, T; -100 is ignored) are given.

        ``logits_to_keep`` limits the positions whose logits are computed: the last n, the given ones, or
        ``"supervised"``: those that predict a label in any row, which spares the head everywhere else.
        ``num_items_in_batch`` is what the summed loss is divided by: the supervised tokens of the whole
        optimizer step, across micro-batches and ranks; without it, those of this batch. ``routing_counts``,
        the same for all micro-batches of a step, balances experts over the step as a whole.
        ``instruction_ids`` and ``instruction_mask`` (B, U): what the user said, for parts that decide by it.
        ``document_lengths`` (C,): the one row holds so many conversations, none of which sees another.
        ``fused_loss`` gives the loss of the supervised positions and no logits, where the head is plain.
        ``unseen_pictures``: no placeholder stands for the pictures; they run, and nothing comes of them.

        Raises:
            ImageCountError: if placeholders and visual tokens differ in number.
            PlanError: if a packed row is given to a model that cannot keep conversations apart.

        """
        with recording() as tape, asked(self.get_input_embeddings(), instruction_ids, instruction_mask):
            pictures = (pixel_values, image_tilings, picture_values)
            embeds_BTD, again, unseen = self._embedded(input_ids, pictures, inputs_embeds, unseen_pictures)
            run, head = self._run(fused_loss, labels, logits_to_keep)
            with packed_row(self.model, document_lengths, position_ids, attention_mask) as row:
                out = run(
                    inputs_embeds=embeds_BTD,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    **kwargs | head | again | row,
                )
        loss = aux_loss = None
        if labels is not None:
            loss = answer_loss(out, self.get_output_embeddings(), labels, head, num_items_in_batch)
            positions = Positions(attention_mask, self._placeholders(input_ids))
            aux_loss = auxiliary_loss(self, tape, positions, routing_counts, unseen)
            if aux_loss is not None:
                aux_loss = aux_loss * supervised_share(labels, num_items_in_batch)
                loss = loss + aux_loss
        kept = {name: out.get(name) for name in _KEPT}
        return VlmixOutput(loss=loss, aux_loss=aux_loss, routing=tuple(tape) or None, **kept)

    def _embedded(
        self, input_ids: Tensor | None, pictures: Pictures, inputs_embeds: Tensor | None, unseen: bool
    ) -> tuple[Tensor, dict[str, Revisit], list[Routing]]:
        """What ``VlmixModel.embed_inputs`` gives, and the routing of pictures that no placeholder shows."""
        if not unseen or pictures[0] is None:
            return *self.model.embed_inputs(input_ids, *pictures, inputs_embeds), []
        embeds_BTD, again = self.model.embed_inputs(input_ids, None, inputs_embeds=inputs_embeds)
        nothing, tape = nothing_of(self.model, len(embeds_BTD), pictures[0], *pictures[1:])
        return embeds_BTD + nothing.to(embeds_BTD), again, tape

    def _placeholders(self, input_ids: Tensor | None) -> Tensor | None:
        return None if input_ids is None else input_ids == self.config.image_token_id

    def _run(
        self, fused: bool, labels: Tensor | None, keep: int | Tensor | Literal["supervised"]
    ) -> tuple[PreTrainedModel, dict[str, int | Tensor]]:
        """What to run, the decoder alone where the loss is fused, and what to tell its head."""
        if fused and labels is not None and self._plain_head():
            return self.model.decoder, {}
        kept = supervised_positions(labels) if isinstance(keep, str) else keep
        return self.model.language_model, {"logits_to_keep": kept}

    def _plain_head(self) -> bool:
        head = self.get_output_embeddings()
        if self._tried_head is None or self._tried_head[0] is not head:
            self._tried_head = (head, has_plain_head(self.model.language_model))
        return self._tried_head[1]

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the pictures over once: later steps find them in the cache."""
        pictures = {name: kwargs.pop(name, None) for name in _PICTURES}
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        return inputs | pictures if is_first_iteration or not kwargs.get("use_cache", True) else inputs

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat each row's own pictures with it: rows hold different numbers of pictures."""
        pictures = {name: model_kwargs.pop(name, None) for name in _PICTURES}
        if pictures["pixel_values"] is not None and expand_size > 1 and input_ids is not None:
            pictures = self._repeated(pictures, input_ids, expand_size)
        expand = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        expanded, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return expanded, {**model_kwargs, **pictures}

    def _repeated(
        self, pictures: dict[str, Tensor | None], input_ids: Tensor, times: int
    ) -> dict[str, Tensor | None]:
        viewing, pixels = self.model.viewing, cast("Tensor", pictures["pixel_values"])
        tilings = viewing.tilings(pixels, pictures["image_tilings"])
        placeholders = (input_ids == self.config.image_token_id).sum(1).tolist()
        shown = pictures_of_rows(placeholders, viewing.tokens(tilings))
        lengths: dict[str, list[int]] = dict.fromkeys(_PICTURES, shown)
        if viewing.plan.varies:
            counts = iter(viewing.counts(tilings))
            lengths["pixel_values"] = [sum(next(counts) for _ in range(row)) for row in shown]
        return {
            name: None
            if value is None
            else torch.cat([part for part in value.split(lengths[name]) for _ in range(times)])
            for name, value in pictures.items()
        }


AutoModel.register(VlmixConfig, VlmixModel, exist_ok=True)
AutoModelForImageTextToText.register(VlmixConfig, VlmixForConditionalGeneration, exist_ok=True)
