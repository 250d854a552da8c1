"""Every registered way to view a picture: plan, processor and model agree, with every fusion and batch."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.tiny import PLACEHOLDER, part, text_config
from vlmix.core.errors import ImageCountError, ImageError, PlanError, RecipeError
from vlmix.core.parts import ENCODERS, FUSIONS, VIEWS, read_part
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import plan_model
from vlmix.models.processing import VlmixProcessor
from vlmix.models.tokenization import train_tokenizer

SIDE = 32
SIZES = [(40, 20), (16, 50), (9, 9)]
TEXTS = ["What is shown here? A tall, a wide and a square picture."] * 4

each_kind = pytest.mark.parametrize("kind", VIEWS.names())


def config(kind, fusion="channel_concat", sees="views", **changes):
    """A tiny model of two encoders; the second may see the whole picture."""
    views = VIEWS.get(kind).settings_class.tiny().model_dump(mode="json")
    if "picture_size" in views and sees == "picture":
        views["picture_size"] = 24
    return VlmixConfig(
        text_config=text_config(vocab_size=320),
        encoders=[part(ENCODERS, "clip"), {**part(ENCODERS, "convnext"), "sees": sees}],
        views={**views, **changes},
        fusion=part(FUSIONS, fusion),
        projector={"kind": "mlp"},
        image_size=SIDE,
        image_token_id=PLACEHOLDER,
    )


def scope_of(kind):
    """What the second encoder may see: the whole picture too, where a view is not the whole already."""
    views = VIEWS.get(kind)
    return "picture" if not views.varies or "picture_size" in views.settings_class.model_fields else "views"


def built(settings):
    torch.manual_seed(0)
    return VlmixForConditionalGeneration(settings).eval()


def processor_of(settings):
    tokenizer = train_tokenizer(TEXTS, 320)
    made = VlmixProcessor(
        VlmixImageProcessor.of(settings), tokenizer, image_seq_length=settings.image_seq_length
    )
    settings.image_token_id = made.image_token_id
    return made


def picture(size, seed=0):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return ImageRef(Image.fromarray(pixels.to(torch.uint8).numpy()))


def sample(*sizes):
    shown = [picture(size, number) for number, size in enumerate(sizes)]
    return Sample("s", (Turn("user", (*shown, "What is shown?")), Turn("assistant", ("A tall picture.",))))


@pytest.mark.slow
@pytest.mark.parametrize("sees", ["views", "picture"])
@each_kind
@torch.no_grad()
def test_every_fusion_gives_what_is_planned(kind, sees):
    planned = 0
    for fusion in FUSIONS.names():
        settings = config(kind, fusion, sees)
        try:
            plan = settings.plan()
        except PlanError:
            continue
        planned += 1
        network, images = built(settings), VlmixImageProcessor.of(settings)
        opened = images.open([picture(size) for size in SIZES])
        asked = torch.ones(1, 1, dtype=torch.int64)
        tokens = network.get_image_features(**opened.named(), instruction_ids=asked).pooler_output
        expected = [images.tokens(size) if plan.varies else plan.tokens for size in SIZES]
        assert [each.shape for each in tokens] == [(count, settings.width) for count in expected]
        assert max(expected) <= plan.tokens
    assert planned > 3 or sees != scope_of(kind)


@each_kind
def test_settings_survive_json_and_refuse_a_misspelt_key(kind):
    tiny = VIEWS.get(kind).settings_class.tiny()
    raw = json.loads(tiny.model_dump_json())
    assert read_part(VIEWS, raw) == tiny
    for key in raw:
        with pytest.raises(RecipeError, match=f"Did you mean '{key}'"):
            read_part(VIEWS, {**raw, key + "x": 1})


@each_kind
def test_training_reaches_every_part_and_saving_keeps_all(kind, tmp_path):
    settings = config(kind, sees=scope_of(kind))
    processor = processor_of(settings)
    network = built(settings)
    batch = processor.collate([processor.encode(sample(*SIZES), supervise=True)])
    network(**batch).loss.backward()
    for name, parameter in network.model.views.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded = VlmixProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        inputs = processor.collate([processor.encode(sample(*SIZES), supervise=False)])
        inputs.pop("labels")
        same = loaded.collate([loaded.encode(sample(*SIZES), supervise=False)])
        assert all(torch.equal(inputs[name], same[name]) for name in inputs)
        torch.testing.assert_close(again(**inputs).logits, network(**inputs).logits)


@each_kind
@torch.no_grad()
def test_a_row_answers_alone_as_it_does_among_others(kind):
    settings = config(kind, sees=scope_of(kind))
    processor = processor_of(settings)
    network = built(settings)
    samples = [sample(*SIZES), sample(), sample(SIZES[1])]
    for how in ({}, {"num_beams": 2}, {"use_cache": False}):
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **how}
        rows = []
        for chosen in (samples, *[[one] for one in samples]):
            encoded = [processor.encode(one, supervise=False) for one in chosen]
            batch = processor.collate(encoded, padding_side="left")
            batch.pop("labels")
            rows.append(network.generate(**batch, **options)[:, -3:])
        assert torch.equal(rows[0], torch.cat(rows[1:]))


@pytest.mark.slow
@each_kind
def test_costs_are_counted_on_shapes(kind):
    settings = config(kind, sees=scope_of(kind))
    cost = plan_model(settings, images=2, text_tokens=4)
    assert cost.parameters == sum(p.numel() for p in built(settings).parameters())
    assert cost.prompt_tokens == 2 * settings.plan().tokens + 4
    assert cost.activation_bytes > 0


@pytest.mark.parametrize("kind", [kind for kind in VIEWS.names() if VIEWS.get(kind).varies])
class TestCutting:
    @settings(max_examples=60, deadline=None)
    @given(width=st.integers(1, 300), height=st.integers(1, 300), budget=st.sampled_from([None, 60, 90]))
    def test_what_is_cut_is_what_was_announced(self, kind, width, height, budget):
        budget = budget if "budget" in VIEWS.get(kind).settings_class.model_fields else None
        settings = config(kind) if budget is None else config(kind, budget=budget)
        plan, images = settings.plan(), VlmixImageProcessor.of(settings)
        opened = images.open([picture((width, height))])
        assert opened.pixel_values.shape == (images.count((width, height)), 3, SIDE, SIDE)
        assert 0 < images.tokens((width, height)) <= min(plan.tokens, budget or plan.tokens)

    def test_the_same_from_a_file_as_from_memory(self, kind, tmp_path):
        """What is counted from a file's header, turned upright, is what is cut from its pixels."""
        settings = config(kind)
        processor = processor_of(settings)
        upright = picture((60, 20)).source
        exif = Image.Exif()
        exif[0x0112] = 6
        upright.save(tmp_path / "turned.jpg", exif=exif)
        upright.save(tmp_path / "turned.png", exif=exif)
        for name in ("turned.jpg", "turned.png"):
            found = ImageRef(tmp_path / name)
            assert found.size() == found.open().size == (20, 60)
            shown = Sample("s", (Turn("user", (found, "What?")),))
            encoded = processor.encode(shown, supervise=False)
            count = processor.image_processor.tokens((20, 60))
            assert encoded.input_ids.count(processor.image_token_id) == count
            assert processor.open_images(encoded).image_tilings.tolist()[0][2:] == [60, 20]

    def test_too_small_a_budget_and_a_missing_picture_size_are_refused_in_the_plan(self, kind):
        known = VIEWS.get(kind).settings_class.model_fields
        if "budget" in known:
            with pytest.raises(PlanError, match="budget"):
                config(kind, budget=3).plan()
        unsized = {"picture_size": None} if "picture_size" in known else {}
        with pytest.raises(PlanError, match="picture_size"):
            config(kind, sees="picture", **unsized).plan()

    def test_what_is_missing_or_does_not_belong_together_is_named(self, kind, tmp_path):
        settings = config(kind)
        processor, network = processor_of(settings), built(settings)
        batch = processor.collate([processor.encode(sample(SIZES[0]), supervise=False)])
        with pytest.raises(ImageCountError, match="image_tilings"):
            network(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
        with pytest.raises(ImageCountError, match=r"but there are pixels|but 0 pictures"):
            network(**{**batch, "pixel_values": batch["pixel_values"][:-1]})
        lost = Sample("lost", (Turn("user", (ImageRef(tmp_path / "no.png"), "What?")),))
        with pytest.raises(ImageError, match="lost"):
            processor.encode(lost, supervise=False)

    def test_placeholders_are_told_to_those_who_ask_for_them(self, kind):
        processor = processor_of(config(kind))
        asked = processor._get_num_multimodal_tokens(image_sizes=[(20, 40)])
        count = processor.image_processor.tokens((40, 20))
        assert asked["num_image_tokens"] == [count]
        assert asked["num_image_patches"] == [processor.image_processor.count((40, 20))]
        opened = processor.image_processor.open([picture((40, 20))]).named()
        assert processor.replace_image_token(opened, 0) == processor.image_token * count
