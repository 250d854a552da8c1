"""Several conversations in one row: loss and every gradient are those of a row for each."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from tests.conformance.test_views import processor_of
from tests.tiny import DECODERS, PLACEHOLDER, part, switch_checkpointing_on, text_config
from vlmix.core.errors import InputError, PlanError
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.models import packing
from vlmix.models.batching import Encoded, packed_row, padded_rows
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.packing import DOCUMENTS, check_packing

pytestmark = pytest.mark.parity
IMAGES, WORDS = (2, 0, 1, 0, 1), (6, 1, 9, 14, 7)
WINDOW = {"num_key_value_heads": 2, "sliding_window": 6}  # shorter than most of the conversations
# What else there is to attention: windows, caps, heads that look elsewhere, experts of the decoder's own.
OTHERS = {
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "head_dim": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOW, "head_dim": 8},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_positions": 128},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},
    "mamba": {"state_size": 4},
}
# float32 sums in another order: of up to 60 positions for the loss, of all rows for a gradient.
LOSS, GRADIENT = {"rtol": 0, "atol": 1e-6}, {"rtol": 0, "atol": 1e-5}


def language(kind, **changes):
    if kind in DECODERS:
        return text_config(kind, **changes)
    return {**text_config("llama"), "model_type": kind, **OTHERS.get(kind, {}), **changes}


def network(kind="llama", fusion=None, experts=(), attention=None, **changes):
    torch.manual_seed(0)
    model = VlmixForConditionalGeneration(
        VlmixConfig(
            text_config=language(kind, **changes),
            encoders=[part(ENCODERS, "clip"), part(ENCODERS, "convnext")],
            fusion=fusion or {"kind": "patch_mining"},
            projector=part(PROJECTORS, "mlp"),
            image_size=32,
            image_token_id=PLACEHOLDER,
            experts=[*experts],
        )
    ).eval()
    with torch.no_grad():  # so that what leaks from one conversation to another is large
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    if attention:
        model.model.decoder.config._attn_implementation = attention
    return model


def conversations(model, images=IMAGES, words=WORDS):
    """Pictures first, then words, of which those after the third are learnt; and all pixels."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for count, length in zip(images, words, strict=True):
        said = torch.randint(4, PLACEHOLDER, (length,), generator=generator).tolist()
        shown = [PLACEHOLDER] * (count * model.model.image_seq_length)
        # The first label is of a token that nothing comes before.
        found.append(
            Encoded([*shown, *said], [*[-100] * len(shown), said[0], -100, *said[2:]][: len(shown + said)])
        )
    pixels = torch.randint(0, 256, (sum(images), 3, 32, 32), generator=generator, dtype=torch.uint8)
    return found, {"pixel_values": pixels} if sum(images) else {}


def trained(model, batch, **options):
    """The loss, and every parameter's gradient."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def same(first, second):
    assert_close(first[0], second[0], **LOSS)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        assert_close(gradient, second[1][name], **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")


def packs_as_it_is(model, images=IMAGES, **options):
    encoded, pictures = conversations(model, images)
    alone = trained(model, {**padded_rows(encoded, 0, "right"), **pictures})
    same(alone, trained(model, {**packed_row(encoded), **pictures}, **options))
    return alone


@pytest.mark.parametrize(
    "kind", [*DECODERS, "mistral", "gemma2", "gemma3_text", "llama4_text", "mixtral", "gpt2"]
)
def test_every_decoder_trains_on_packed_rows_as_on_single_ones(kind):
    model = network(kind)
    _, gradients = packs_as_it_is(model)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.1
    expected = "eager" if kind == "gemma2" else DOCUMENTS
    assert model.model.packs_with == expected


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_a_mask_of_blocks_too(kind, attention, monkeypatch):
    monkeypatch.setattr(packing, "_WHOLE", "none")
    model = network(kind, attention=attention)
    packs_as_it_is(model)
    assert model.model.packs_with == attention


@pytest.mark.parametrize("fusion", FUSIONS.names())
@pytest.mark.parametrize("images", [IMAGES, (0, 0, 0, 0, 0)])
def test_every_fusion_trains_on_packed_rows(fusion, images):
    try:
        model = network(fusion={"kind": fusion})
    except PlanError as error:
        pytest.skip(f"not with these encoders: {error}")
    if model.config.reads_instruction:
        with pytest.raises(PlanError, match="what the user said"):
            check_packing(model.model)
    else:
        packs_as_it_is(model, images)


@pytest.mark.parametrize("kind", ["llama", "stablelm", "mistral", "gemma2"])
def test_layers_that_run_once_more_see_the_same_conversations(kind):
    plain, again = network(kind), network(kind).train()
    switch_checkpointing_on(again)
    encoded, pictures = conversations(plain)
    batch = {**packed_row(encoded), **pictures}
    same(trained(plain, batch), trained(again, batch))


def mixture(**changes):
    router = {"kind": "topk", "k": 2}
    return {"place": "language_model", "layers": "all", "count": 4, "router": router, **changes}


def test_experts_of_tokens_train_and_balance_as_before():
    settings = [
        mixture(balance={"switch": 0.5, "z": 0.1, "per_modality": True}),
        mixture(place="encoders.0", router={"kind": "soft"}, balance={"switch": 0}),
    ]
    packs_as_it_is(network(experts=settings))


def test_what_decides_for_a_whole_row_is_refused():
    model = network(experts=[mixture(scope="instance", router={"kind": "instance"})])
    encoded, pictures = conversations(model)
    with pytest.raises(PlanError, match="what the user said"):
        model(**packed_row(encoded), **pictures)


def test_a_router_whose_tokens_compete_is_named():
    """It is no fault of the attention that the second expert is drawn for the batch as a whole."""
    sampled, alone = (
        {"kind": "deepspeed095", **more} for more in ({}, {"second": "best", "drop_tokens": False})
    )
    with pytest.raises(
        PlanError, match=r"mlp.router \(Deepspeed095Router\) lets all tokens of a batch compete"
    ):
        check_packing(network(experts=[mixture(router=sampled)]).model)
    check_packing(network(experts=[mixture(router=alone)]).model)


@pytest.mark.parametrize("kind", ["falcon", "gpt_oss", "mamba"])
def test_a_decoder_that_carries_on_is_found_out(kind):
    model = network(kind)
    modes = [module.training for module in model.train().modules()]
    with pytest.raises(PlanError, match="carries something from one conversation"):
        check_packing(model.model)
    assert [module.training for module in model.modules()] == modes
    assert model.model.decoder.config._attn_implementation != DOCUMENTS


def test_a_mask_is_made_only_where_a_window_asks_for_one(monkeypatch):
    made = []
    real = packing.sdpa_mask
    monkeypatch.setattr(packing, "sdpa_mask", lambda **given: made.append(1) or real(**given))
    model = network("mistral")
    check_packing(model.model)
    made.clear()
    short, _ = conversations(model, (0, 0), (5, 6))
    model(**packed_row(short))
    assert not made
    long, _ = conversations(model, (0, 0), (5, 7))
    model(**packed_row(long))
    assert made


def test_other_conversations_change_not_one_bit_and_rows_with_padding_still_work():
    model = network()
    encoded, _ = conversations(model, (0, 0, 0), (6, 9, 5))
    row = packed_row(encoded)
    changed = {**row, "input_ids": row["input_ids"].clone()}
    changed["input_ids"][:, 6:15] = 7
    with torch.no_grad():
        first, second = (model(**batch).logits for batch in (row, changed))
        alone = model(**padded_rows(encoded, 0, "left")).logits
    assert torch.equal(first[:, :6], second[:, :6])
    assert torch.equal(first[:, 15:], second[:, 15:])
    assert_close(first[0, 15:], alone[2, -5:], rtol=0, atol=1e-5)  # padding changes the order of sums
    assert model.model(**row).last_hidden_state.shape == (1, 20, 32)
    with pytest.raises(InputError, match="no attention_mask"):
        model(**row, attention_mask=torch.ones(1, 20))


def test_flash_attention_is_told_where_conversations_end(monkeypatch):
    told = []

    def flash(module, query, key, value, mask, **given):
        told.append((mask, given))
        return query.transpose(1, 2), None

    AttentionInterface.register("a_flash", flash)
    AttentionMaskInterface.register("a_flash", flash_attention_mask)
    monkeypatch.setattr(packing, "_keeps_apart", lambda model: True)
    model = network(attention="a_flash")
    encoded, _ = conversations(model, (0, 0, 0), (6, 9, 5))
    model(**packed_row(encoded))
    mask, given = told[-1]
    assert mask is None
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert_close(given[name], torch.tensor([0, 6, 15, 20], dtype=torch.int32))
    assert (given["max_length_q"], given["max_length_k"]) == (9, 9)


def test_torchs_kernel_for_any_lengths_is_called_as_it_wants_to_be(monkeypatch):
    def kernel(query, key, value, ends, _, longest, __, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0)
        assert enable_gqa
        assert longest == int(ends.diff().max())
        assert ends.dtype == torch.int32
        lengths = ends.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
        attend = nn.functional.scaled_dot_product_attention
        found = [attend(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
        return torch.cat(found, 1).transpose(0, 1)

    monkeypatch.setattr(packing, "_varlen", lambda: kernel)
    monkeypatch.setattr(packing, "_half", lambda query: query.dtype)
    packs_as_it_is(network())


def test_the_processor_packs_conversations_with_pictures_of_any_number():
    torch.manual_seed(0)
    model = network(vocab_size=320)
    processor = processor_of(model.config)
    picture = ImageRef(Image.new("RGB", (20, 10), (255, 0, 0)))
    samples = [
        Sample(str(n), (Turn("user", (*[picture] * n, "how many?")), Turn("assistant", ("two circles",))))
        for n in (1, 0, 2)
    ]
    encoded = [processor.encode(sample, supervise=True) for sample in samples]
    assert [item.has_images for item in encoded] == [True, False, True]
    row, rows = processor.collate(encoded, packed=True), processor.collate(encoded)
    assert "attention_mask" not in row
    assert row["document_lengths"].tolist() == [item.length for item in encoded]
    assert torch.equal(row["pixel_values"], rows["pixel_values"])
    same(trained(model, rows), trained(model, row))
    told = [Encoded([5], [5], instruction_ids=[1])]
    with pytest.raises(PlanError, match="once for each row"):
        processor.collate(told, opened=[], packed=True)
