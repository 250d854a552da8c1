"""Published folders on every decoder, beside transformers' own decoder with the same weights, and back again.

1e-5: the same float32 arithmetic in another order.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.layouts import (
    AUX_SIDE,
    KINDS,
    SIDE,
    WIDTH,
    decoder,
    llava,
    mini_gemini,
    projector,
)
from vlmix.convert._source import PublishedFolder
from vlmix.convert.export import export
from vlmix.convert.families.llava import Llava
from vlmix.convert.families.mini_gemini import MiniGemini
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe_file import with_overrides

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
IDS = torch.tensor([[2, 5, 7, 11, 13], [2, 9, 8, 33, 4]])
MINED = ["llama", "gemma", "mixtral", "mistral"]


def loaded(folder):
    return VlmixForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


def exact_gemma(model):
    """The decoder as transformers 4.38 ran it: with the exact GELU."""
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    return model


def agree(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def same_files(one, other):
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_llava_on_any_decoder_reads_text_as_transformers_does_and_goes_back(kind, tmp_path):
    published = llava(kind, tmp_path / "hub", tmp_path)
    assert convert(published, tmp_path / "ours").family == "llava"
    model = loaded(tmp_path / "ours")
    agree(model(input_ids=IDS).logits, decoder(kind)(input_ids=IDS).logits)
    export(tmp_path / "ours", tmp_path / "back", "llava")
    same_files(published, tmp_path / "back")
    model.save_pretrained(tmp_path / "trained")  # nothing is known about where it came from
    export(tmp_path / "trained", tmp_path / "written", "llava")
    # CLIP's last block is not in the model, so its depth is one less than the published one's.
    again = convert(
        tmp_path / "written",
        tmp_path / "again",
        change=lambda raw: with_overrides(raw, ["encoders.0.feature_layer=-1"]),
    )
    assert again.family == "llava"
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.full((2, 4), model.config.image_token_id), IDS), dim=1)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(loaded(tmp_path / "again")(input_ids=ids, pixel_values=pixels).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("generation", ["MGM", "MiniGemini"])
@pytest.mark.parametrize("kind", MINED)
def test_mini_gemini_on_any_decoder_reads_text_as_transformers_does_and_goes_back(kind, generation, tmp_path):
    published = mini_gemini(kind, tmp_path / "hub", tmp_path, generation=generation)
    assert convert(published, tmp_path / "ours").family == "mini_gemini"
    expected = exact_gemma(decoder(kind)) if kind == "gemma" else decoder(kind)
    agree(loaded(tmp_path / "ours")(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    export(tmp_path / "ours", tmp_path / "back", "mini_gemini")
    same_files(published, tmp_path / "back")


@torch.no_grad()
def test_gemma_is_run_with_the_exact_gelu_and_scales_what_it_sees(tmp_path):
    published = mini_gemini("gemma", tmp_path / "hub", tmp_path)
    convert(published, tmp_path / "ours")
    model, reference = loaded(tmp_path / "ours"), decoder("gemma")
    assert model.config.language.hidden_act == "gelu_python"
    by_tanh = reference(input_ids=IDS).logits
    assert (by_tanh - exact_gemma(reference)(input_ids=IDS).logits).abs().max() > 10 * TOLERANCE
    pixels = torch.rand(1, 3, AUX_SIDE, AUX_SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.full((1, 4), model.config.image_token_id), IDS[:1]), dim=1)
    fused = model.get_image_features(pixels).last_hidden_state
    weights = {name.removeprefix("model.mm_projector."): value for name, value in projector().items()}
    hidden = F.gelu(F.linear(fused, weights["0.weight"], weights["0.bias"]))
    seen = F.linear(hidden, weights["2.weight"], weights["2.bias"])
    # As transformers 4.38: looked up without a factor, then everything times the root of the width.
    read = torch.cat((seen, F.embedding(IDS[:1], reference.model.embed_tokens.weight)), dim=1) * WIDTH**0.5
    agree(
        model(input_ids=ids, pixel_values=pixels).logits,
        exact_gemma(reference)(inputs_embeds=read).logits,
    )


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ({"hidden_act": "gelu"}, "gelu_python"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
    ],
)
def test_gemmas_activation_is_that_of_the_version_that_wrote_the_config(said, taken, tmp_path):
    folder = mini_gemini("gemma", tmp_path / "hub", tmp_path)
    flat = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**flat, **said}))
    reading = MiniGemini.read(PublishedFolder(folder, tmp_path))
    assert reading.config["text_config"]["hidden_act"] == taken


def with_head(folder, change):
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": change(head)}, folder / "model.safetensors")


@torch.no_grad()
def test_a_tied_head_that_is_stored_again_must_be_equal_or_be_untied(tmp_path):
    published = mini_gemini("gemma", tmp_path / "hub", tmp_path)
    with_head(published, lambda head: head)
    done = convert(published, tmp_path / "ours")
    assert done.kept["lm_head.weight"] == "equal to model.embed_tokens.weight"
    agree(
        loaded(tmp_path / "ours")(input_ids=IDS).logits,
        exact_gemma(decoder("gemma"))(input_ids=IDS).logits,
    )
    export(tmp_path / "ours", tmp_path / "back", "mini_gemini")
    same_files(published, tmp_path / "back")
    with_head(published, lambda head: head.index_add_(0, torch.tensor([63]), torch.ones(1, WIDTH)))
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight .*tie_word_embeddings=false"):
        convert(published, tmp_path / "other")
    convert(
        published,
        tmp_path / "untied",
        change=lambda raw: with_overrides(raw, ["text_config.tie_word_embeddings=false"]),
    )
    language = loaded(tmp_path / "untied").model.language_model
    assert not torch.equal(language.lm_head.weight, language.model.embed_tokens.weight)


def test_a_missing_expert_is_named(tmp_path):
    published = mini_gemini("mixtral", tmp_path / "hub", tmp_path)
    tensors = load_file(published / "model.safetensors")
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del tensors[lost]
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {lost}"):
        convert(published, tmp_path / "ours")


@pytest.mark.parametrize(
    ("family", "kind", "vocabulary", "template"),
    [
        (MiniGemini, "llama", 32000, "vicuna"),
        (MiniGemini, "llama", 128256, "llama3_mgm"),
        (MiniGemini, "llama", 64000, "chatml"),
        (MiniGemini, "gemma", 256000, "gemma"),
        (MiniGemini, "mixtral", 32000, "mistral_mgm"),
        (Llava, "llama", 32000, "vicuna"),
        (Llava, "llama", 64000, "chatml"),
        (Llava, "llama", 128256, "llama3"),
        (Llava, "mistral", 32000, "mistral"),
        (Llava, "qwen2", 151936, "chatml"),
        (Llava, "phi", 50295, "phi"),
    ],
)
def test_the_template_is_told_by_decoder_and_vocabulary(family, kind, vocabulary, template, tmp_path):
    make = mini_gemini if family is MiniGemini else llava
    folder = make(kind, tmp_path / "hub", tmp_path)
    flat = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**flat, "vocab_size": vocabulary}))
    assert family.read(PublishedFolder(folder, tmp_path)).chat_template == template
