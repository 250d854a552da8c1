"""Fusion that goes on inside the decoder: Cambrian's aggregators between its layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.conformance.test_views import SIZES, processor_of, sample
from tests.tiny import PLACEHOLDER, part, switch_checkpointing_on, text_config
from vlmix.core.errors import PlanError
from vlmix.core.parts import ENCODERS, FUSIONS
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import plan_model

AFTER = (0, 2)


def config(views="unpadded", aggregation="joint", model_type="llama", after=AFTER, width=32):
    fusion = {**part(FUSIONS, "spatial_aggregator"), "aggregation": aggregation}
    return VlmixConfig(
        text_config=text_config(model_type, vocab_size=320, num_hidden_layers=4),
        encoders=[part(ENCODERS, "clip"), part(ENCODERS, "convnext")],
        views={"kind": views},
        fusion={**fusion, "inside": {"after": after, "width": width}},
        projector={"kind": "mlp"},
        image_size=32,
        image_token_id=PLACEHOLDER,
    )


def built(settings):
    torch.manual_seed(0)
    model = VlmixForConditionalGeneration(settings).eval()
    with torch.no_grad():
        for parameter in model.model.fusion.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch_of(processor, *samples, side="right"):
    return processor.collate([processor.encode(one, supervise=True) for one in samples], padding_side=side)


def rows_shown(found, width, height):
    """A map of a picture wider than high, with the rows of padding above and below it hidden."""
    rows, columns = found.grid
    margin = (rows - int(height * columns / width)) // 2
    mask = torch.ones(1, rows, columns, dtype=torch.bool)
    mask[:, :margin] = mask[:, rows - margin :] = False
    return replace(found, mask=mask.flatten(1))


@pytest.mark.parametrize("aggregation", ["joint", "separate"])
@torch.no_grad()
def test_one_picture_step_by_step(aggregation):
    """As the authors run it: one picture, its place known, layer after layer of the decoder by hand."""
    settings = config(aggregation=aggregation)
    processor = processor_of(settings)
    model = built(settings)
    inner, width, height = model.model, *SIZES[0]
    batch = batch_of(processor, sample((width, height)))
    found = model(**batch, output_hidden_states=True)
    maps = [encoder(batch["pixel_values"]) for encoder in inner.encoders]
    margin = (2 - int(height * 2 / width)) // 2  # on a grid of 2 x 2; the picture is wider than high
    kept = torch.arange(4).view(2, 2)[margin : 2 - margin].flatten()
    shown = [rows_shown(found_map, width, height) for found_map in maps]
    memory = inner.fusion.merge(shown).memory
    first = int((batch["input_ids"][0] == processor.image_token_id).nonzero()[0])
    places = [first + row * 3 + column for row in range(2 - 2 * margin) for column in range(2)]
    x, _ = inner.embed_inputs(batch["input_ids"], batch["pixel_values"], batch["image_tilings"])
    decoder = inner.decoder
    positions = torch.arange(x.shape[1])[None]
    rotations = decoder.rotary_emb(x, positions)
    for index, layer in enumerate(decoder.layers):
        x = layer(x, position_embeddings=rotations, position_ids=positions)
        if index in AFTER:
            new = inner.fusion.inside[AFTER.index(index)](
                x[:, places],
                memory.context.expand(-1, len(places), -1),
                [window[:, kept] for window in memory.windows],
                [mask[:, kept] for mask in memory.masks],
            )
            x[:, places] = new
    assert_close(decoder.norm(x), found.hidden_states[-1])


@pytest.mark.parametrize("views", ["whole", "unpadded", "anyres", "hd"])
@torch.no_grad()
def test_rows_answer_alone_as_among_others_with_and_without_a_cache(views):
    settings = config(views)
    if views == "hd":
        settings.views |= {"tile_size": 16}
    processor = processor_of(settings)
    model = built(settings)
    samples = [sample(*SIZES), sample(), sample(SIZES[1])]
    rows = []
    for chosen in (samples, *[[one] for one in samples]):
        encoded = [processor.encode(one, supervise=False) for one in chosen]
        batch = processor.collate(encoded, padding_side="left")
        batch.pop("labels")
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        cached = model.generate(**batch, **options)[:, -3:]
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False)[:, -3:])
        rows.append(cached)
    assert torch.equal(rows[0], torch.cat(rows[1:]))


def test_gradients_reach_every_layer_inside_and_checkpointing_changes_none():
    settings = config()
    processor = processor_of(settings)
    model = built(settings).train()
    batch = batch_of(processor, sample(*SIZES), sample(SIZES[1]))
    model(**batch).loss.backward()
    inside = dict(model.model.fusion.inside.named_parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in inside.values())
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    switch_checkpointing_on(model)
    model(**batch).loss.backward()
    again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert_close(again[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "phi", "stablelm", "gemma", "gpt_neox"])
@torch.no_grad()
def test_any_decoder_lets_the_fusion_in(model_type):
    settings = config(model_type=model_type)
    processor = processor_of(settings)
    model = built(settings)
    batch = batch_of(processor, sample(SIZES[0]))
    before = model(**batch).logits
    for parameter in model.model.fusion.inside.parameters():
        parameter.mul_(1.5)
    assert not torch.allclose(model(**batch).logits, before)


def test_the_plan_knows_it_and_refuses_what_does_not_fit():
    cost = plan_model(config(), text_tokens=4)
    assert cost.parameters == sum(p.numel() for p in built(config()).parameters())
    without = {**config().fusion, "inside": None}
    plain = config()
    plain.fusion = without
    fusions = [next(p for p in plan_model(c).parts if p.name.startswith("fusion")) for c in (config(), plain)]
    assert fusions[0].flops > fusions[1].flops
    with pytest.raises(PlanError, match="32 wide"):
        config(width=16).plan()
    with pytest.raises(PlanError, match="no decoder layer 7"):
        built(config(after=(7,)))
