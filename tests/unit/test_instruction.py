"""What the user asked reaches routers: the same in training, answering, any batch and view of a picture."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.conformance.test_views import SIDE, SIZES, TEXTS, picture
from tests.tiny import PLACEHOLDER, part, switch_checkpointing_on, text_config
from vlmix.core.errors import InputError, PlanError
from vlmix.core.parts import ENCODERS, FUSIONS, VIEWS
from vlmix.core.sample import Sample, Turn
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.loading import load
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import plan_model, training_bytes
from vlmix.models.processing import VlmixProcessor
from vlmix.models.tokenization import train_tokenizer

MOLE = {
    "kind": "adapter",
    "scope": "instance",
    "layers": "all",
    "count": 3,
    "width": 4,
    "router": {"kind": "instance", "k": 1},
    "balance": {"switch": 0.0},
}
MOVE = part(FUSIONS, "mixture_of_vision_experts")


def config(views="whole", fusion=MOVE, experts=(MOLE,), **changes):
    return VlmixConfig(
        text_config=text_config(vocab_size=320),
        encoders=[part(ENCODERS, "clip"), part(ENCODERS, "convnext")],
        views=VIEWS.get(views).settings_class.tiny().model_dump(mode="json"),
        fusion=fusion,
        projector={"kind": "identity"},
        image_size=SIDE,
        image_token_id=PLACEHOLDER,
        experts=list(experts),
        **changes,
    )


def processor_of(settings):
    made = VlmixProcessor(
        VlmixImageProcessor.of(settings),
        train_tokenizer(TEXTS, 320),
        image_seq_length=settings.image_seq_length,
        reads_instruction=settings.reads_instruction,
    )
    settings.image_token_id = made.image_token_id
    return made


def built(settings):
    """Routers and adapters far from their first values, so that every choice shows."""
    torch.manual_seed(0)
    model = VlmixForConditionalGeneration(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "experts" in name:
                parameter.mul_(2).add_(torch.randn_like(parameter) * 0.5)
        # Embeddings of 0.02 would leave routers with nothing to tell apart.
        model.get_input_embeddings().weight.mul_(50)
    return model


def asked(*words, sizes=SIZES[:1]):
    """A conversation of several questions, each with the same answer."""
    shown = [picture(size, number) for number, size in enumerate(sizes)]
    turns = [Turn("user", (*shown, words[0]))]
    for word in words[1:]:
        turns += [Turn("assistant", ("A tall picture.",)), Turn("user", (word,))]
    return Sample(words[0], (*turns, Turn("assistant", ("A tall picture.",))))


SAMPLES = [asked("What is shown?", sizes=SIZES), asked("wide"), asked("square", "a tall", sizes=SIZES[1:2])]


def batch_of(processor, *samples, supervise=True, side="right"):
    encoded = [processor.encode(one, supervise=supervise) for one in samples]
    return processor.collate(encoded, padding_side=side)


def test_it_is_the_mean_of_what_the_user_said_in_training_and_answering_alike():
    settings = config()
    processor, model = processor_of(settings), built(settings)
    sample = SAMPLES[2]
    learnt, judged = (processor.encode(sample, supervise=flag) for flag in (True, False))
    assert learnt.instruction_ids == judged.instruction_ids
    words = [processor.tokenizer(word, add_special_tokens=False).input_ids for word in ("square", "a tall")]
    assert learnt.instruction_ids == words[0] + words[1]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "square"}]},
        {"role": "assistant", "content": "A tall picture."},
        {"role": "user", "content": "a tall"},
    ]
    shown = sample.images[0].open()
    told = processor.apply_chat_template(messages, images=shown, tokenize=True, add_generation_prompt=True)
    prompt = processor.apply_chat_template(messages, images=shown, add_generation_prompt=True)
    plain = processor(images=shown, text=prompt, instruction="square")
    assert told["instruction_ids"].tolist() == [learnt.instruction_ids]
    assert plain["instruction_ids"].tolist() == [words[0]]
    assert set(processor.model_input_names) >= set(told.keys())
    found = model(**told).routing[-1].logits
    table = model.get_input_embeddings().weight
    mean = table[learnt.instruction_ids].mean(0)[None, None]
    layer = model.model.language_model.model.layers[-1].mlp
    assert_close(found, layer.router(mean).logits)


@torch.no_grad()
def test_control_words_in_what_somebody_typed_stay_text():
    settings = config()
    processor = processor_of(settings)
    forged = processor.encode(asked("<image>", sizes=()), supervise=True)
    assert processor.image_token_id not in forged.instruction_ids
    nothing = batch_of(processor, asked("", sizes=SIZES[:1]))
    assert nothing["instruction_ids"].shape == (1, 0)
    assert built(settings)(**nothing).logits.isfinite().all()


@pytest.mark.parametrize("views", ["whole", "anyres", "hd"])
@torch.no_grad()
def test_rows_answer_alone_as_among_others_with_and_without_a_cache(views):
    settings = config(views)
    processor, model = processor_of(settings), built(settings)
    rows = []
    for chosen in (SAMPLES, *[[one] for one in SAMPLES]):
        batch = batch_of(processor, *chosen, supervise=False, side="left")
        batch.pop("labels")
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        cached = model.generate(**batch, **options)[:, -3:]
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False)[:, -3:])
        beams = model.generate(**batch, **options, num_beams=2)[:, -3:]
        rows.append(torch.cat([cached, beams], 1))
    assert torch.equal(rows[0], torch.cat(rows[1:]))


@pytest.mark.parametrize("views", ["whole", "anyres", "hd"])
@torch.no_grad()
def test_every_view_of_a_rows_pictures_is_weighed_by_that_rows_instruction(views):
    settings = config(views)
    processor, model = processor_of(settings), built(settings)
    batch = batch_of(processor, *SAMPLES)
    fusion, *layers = model(**batch).routing
    assert fusion.layer == "fusion"
    decided = layers[0].logits.argmax(-1)
    assert len({*map(tuple, fusion.logits.round(decimals=3).tolist())}) == len(SAMPLES)
    tilings = model.model.viewing.tilings(batch["pixel_values"], batch.get("image_tilings"))
    counts = model.model.viewing.counts(tilings)
    views_of = [sum(counts[:3]), counts[3], counts[4]]
    for row, some in enumerate(fusion.logits.split(views_of)):
        alone = model(**batch_of(processor, SAMPLES[row])).routing
        assert_close(some, alone[0].logits)
        assert torch.equal(alone[1].logits.argmax(-1), decided[row : row + 1])


@torch.no_grad()
def test_another_question_changes_what_is_seen_and_which_adapter_speaks():
    settings = config()
    processor, model = processor_of(settings), built(settings)
    batch = batch_of(processor, SAMPLES[0])
    before = model(**batch)
    other = model(
        **{
            **batch,
            "instruction_ids": batch_of(processor, SAMPLES[1])["instruction_ids"],
            "instruction_mask": None,
        }
    )
    assert not torch.allclose(before.routing[0].weights, other.routing[0].weights)
    assert not torch.allclose(before.logits, other.logits)
    features = {name: batch[name] for name in ("pixel_values", "instruction_ids", "instruction_mask")}
    one_for_all = model.get_image_features(**features).pooler_output
    again = {**features, **{n: features[n].expand(3, -1) for n in ("instruction_ids", "instruction_mask")}}
    assert_close(model.get_image_features(**again).pooler_output, one_for_all)


def test_checkpointing_keeps_the_instruction_and_changes_no_gradient():
    settings = config()
    processor, model = processor_of(settings), built(settings).train()
    batch = batch_of(processor, *SAMPLES)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        switch_checkpointing_on(model)
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert any("mlp.router" in name and gradient.any() for name, gradient in plain.items())
    assert all(plain[name].any() for name in plain if name.startswith("model.fusion."))
    for name, gradient in plain.items():
        assert_close(again[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_what_reads_no_instruction_is_given_none_and_what_does_says_when_it_is_missing():
    plain = config(fusion={**MOVE, "weights": "add"}, experts=())
    assert not plain.reads_instruction
    assert "instruction_ids" not in batch_of(processor_of(plain), SAMPLES[1])
    settings = config()
    processor, model = processor_of(settings), built(settings)
    batch = batch_of(processor, SAMPLES[1])
    without = {name: value for name, value in batch.items() if not name.startswith("instruction")}
    with pytest.raises(PlanError, match="fusion: its router reads the instruction"):
        model(**without)
    with pytest.raises(PlanError, match=r"layers\.0\.mlp: its router reads the instruction"):
        model(input_ids=batch["input_ids"][:, -3:])
    with pytest.raises(InputError, match="1 texts, but 0 instructions"):
        processor(text="wide")
    with pytest.raises(InputError, match="2 instructions for 3 pictures"):
        model.get_image_features(
            torch.rand(3, 3, SIDE, SIDE), instruction_ids=torch.ones(2, 1, dtype=torch.long)
        )
    with pytest.raises(PlanError, match="made for instructions 16 wide"):
        config(fusion={**MOVE, "instruction": 16}).plan()
    with pytest.raises(PlanError, match="rows are pictures"):
        config(experts=({**MOLE, "place": "encoders.0"},)).plan()


def test_a_folder_keeps_it(tmp_path):
    settings = config()
    processor, model = processor_of(settings), built(settings)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, told = load(tmp_path, "cpu")
    batch = batch_of(processor, *SAMPLES)
    assert told.reads_instruction
    assert torch.equal(batch_of(told, *SAMPLES)["instruction_ids"], batch["instruction_ids"])
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_the_plan_counts_what_reads_an_instruction():
    settings = config("anyres")
    cost = plan_model(settings, text_tokens=4)
    model = built(settings)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert training_bytes(model.to("meta"), rows=2, images=2, text_tokens=4) > cost.activation_bytes / 2
