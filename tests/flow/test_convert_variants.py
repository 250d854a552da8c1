"""Published folders that differ from the usual ones in an option, and values that nothing can be made of."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.layouts import CHANNELS, SIDE, WIDTH, llava, mini_gemini, written
from tests.tiny import text_config
from vlmix.convert._source import PublishedFolder
from vlmix.convert.export import export
from vlmix.convert.families.eagle import _eva02_global
from vlmix.convert.registry import FAMILIES
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError, PlanError
from vlmix.models.modeling import VlmixForConditionalGeneration

pytestmark = pytest.mark.flow
ONES = torch.ones
CANVASES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[2 * SIDE, SIDE], [SIDE, 2 * SIDE]]}
NEWLINE = {"model.image_newline": ONES(WIDTH)}
BIG = ONES(64, WIDTH)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Tensors and config of each family's usual folder."""
    root = tmp_path_factory.mktemp("plain")
    folders = {"llava": llava, "mini_gemini": mini_gemini}
    made = {name: make("llama", root / name, root) for name, make in folders.items()}
    return {
        name: (load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text()))
        for name, path in made.items()
    }


def folder(plain, path, family="llava", tensors=(), config=(), without="none."):
    """The usual folder with some tensors and keys put in, and some tensors left out."""
    usual, settings = plain[family]
    kept = {key: value for key, value in usual.items() if not key.startswith(without)}
    return written(path, {**kept, **dict(tensors)}, {**settings, **dict(config)})


def loaded(path):
    return VlmixForConditionalGeneration.from_pretrained(path).eval()


def seen(path):
    model = loaded(path)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.get_image_features(pixels).pooler_output


def same(source, back):
    before, after = (load_file(path / "model.safetensors") for path in (source, back))
    configs = [json.loads((path / "config.json").read_text()) for path in (source, back)]
    equal = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return equal and configs[0] == configs[1]


def wide_clip():
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=8,
    )
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {f"{prefix}{key}": value.clone() for key, value in CLIPVisionModel(config).state_dict().items()}


def linear(place, inputs=CHANNELS):
    return {
        f"model.mm_projector.{place}weight": ONES(WIDTH, inputs),
        f"model.mm_projector.{place}bias": ONES(WIDTH),
    }


PROJECTORS = {
    "linear": lambda: linear(""),
    "mlp1x_gelu": lambda: linear("0."),
    "mlp3x_gelu": lambda: {**linear("0."), **linear("2.", WIDTH), **linear("4.", WIDTH)},
    "identity": wide_clip,
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_of_llava_goes_both_ways(kind, plain, tmp_path):
    given = folder(
        plain,
        tmp_path / "given",
        tensors=PROJECTORS[kind](),
        config={"mm_projector_type": kind},
        without="model.mm_projector.",
    )
    convert(given, tmp_path / "ours")
    assert loaded(tmp_path / "ours").config.projector["kind"] == kind.partition("x")[0].rstrip("13")
    export(tmp_path / "ours", tmp_path / "back", "llava")
    assert same(given, tmp_path / "back")
    loaded(tmp_path / "ours").save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", "llava")
    convert(tmp_path / "written", tmp_path / "again")
    assert torch.equal(seen(tmp_path / "again"), seen(tmp_path / "ours"))


def test_identity_needs_channels_of_the_decoders_width(plain, tmp_path):
    given = folder(
        plain,
        tmp_path / "given",
        config={"mm_projector_type": "identity"},
        without="model.mm_projector.",
    )
    with pytest.raises(PlanError, match="16 channels are not the language model's 32"):
        convert(given, tmp_path / "ours")


def test_the_class_token_can_be_read_with_the_patches(plain, tmp_path):
    convert(folder(plain, tmp_path / "patch"), tmp_path / "without")
    given = folder(plain, tmp_path / "given", config={"mm_vision_select_feature": "cls_patch"})
    convert(given, tmp_path / "with")
    torch.testing.assert_close(seen(tmp_path / "with")[:, 1:], seen(tmp_path / "without"))
    export(tmp_path / "with", tmp_path / "back", "llava")
    assert same(given, tmp_path / "back")
    unpadded = {**CANVASES, "mm_vision_select_feature": "cls_patch", "mm_patch_merge_type": "spatial_unpad"}
    strip = folder(plain, tmp_path / "strip", tensors=NEWLINE, config=unpadded)
    with pytest.raises(PlanError, match="has no rows"):
        convert(strip, tmp_path / "no")


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"mm_patch_merge_type": "spatial_unpad"}, True),
        ({**CANVASES, "mm_patch_merge_type": "spatial"}, True),
        ({**CANVASES, "mm_patch_merge_type": "flat"}, False),
        ({**CANVASES, "mm_patch_merge_type": "spatial_unpad"}, True),
    ],
)
def test_a_newline_that_ends_no_rows_is_kept_aside(config, stored, plain, tmp_path):
    given = folder(plain, tmp_path / "given", tensors=NEWLINE if stored else {}, config=config)
    done = convert(given, tmp_path / "ours")
    used = config == {**CANVASES, "mm_patch_merge_type": "spatial_unpad"}
    assert ("model.image_newline" in done.kept) == (stored and not used)
    export(tmp_path / "ours", tmp_path / "back", "llava")
    assert same(given, tmp_path / "back")


def test_one_tower_of_eagles_and_llava_hrs_classes_is_llavas(plain, tmp_path):
    convert(folder(plain, tmp_path / "llava"), tmp_path / "ours")
    eagle = {"architectures": ["EagleLlamaForCausalLM"], "model_type": "eagle_llama"}
    convert(folder(plain, tmp_path / "eagle", config=eagle), tmp_path / "one")
    assert torch.equal(seen(tmp_path / "one"), seen(tmp_path / "ours"))
    larger = {"input_image_size": SIDE + 8, "is_multipath_encoder": False}
    convert(folder(plain, tmp_path / "hr", config=larger), tmp_path / "larger")
    model = loaded(tmp_path / "larger")
    assert (model.config.image_size, model.config.plan().fused.grid) == (SIDE + 8, (3, 3))
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", "llava")
    convert(tmp_path / "written", tmp_path / "again")
    assert torch.equal(seen(tmp_path / "again"), seen(tmp_path / "larger"))


def test_the_type_tells_the_decoder_where_no_class_is_named(plain, tmp_path):
    convert(folder(plain, tmp_path / "given", config={"architectures": None}), tmp_path / "ours")
    assert loaded(tmp_path / "ours").config.language.model_type == "llama"


@pytest.mark.parametrize("family", ["llava", "mini_gemini"])
@pytest.mark.parametrize(("said", "fit"), [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_first_stages_cut_pictures_in_the_middle(family, said, fit, plain, tmp_path):
    given = folder(plain, tmp_path / "given", family, config={"image_aspect_ratio": said})
    assert FAMILIES.get(family).read(PublishedFolder(given, tmp_path)).fit == fit


def test_what_was_trained_on_cut_pictures_is_written_so(plain, tmp_path):
    convert(folder(plain, tmp_path / "given"), tmp_path / "ours")
    loaded(tmp_path / "ours").save_pretrained(tmp_path / "trained")
    for fit, said in (("pad", "pad"), ("crop", "square")):
        processor = {"image_processor": {"fit": fit}}
        (tmp_path / "trained" / "processor_config.json").write_text(json.dumps(processor))
        export(tmp_path / "trained", tmp_path / fit, "llava")
        assert json.loads((tmp_path / fit / "config.json").read_text())["image_aspect_ratio"] == said


def test_mini_gemini_is_written_with_the_index_that_its_code_looks_weights_up_in(plain, tmp_path):
    given = folder(plain, tmp_path / "given", "mini_gemini")
    convert(given, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "mini_gemini")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(load_file(given / "model.safetensors"), "model.safetensors")
    assert convert(tmp_path / "back", tmp_path / "again").family == "mini_gemini"


@pytest.mark.parametrize(
    ("name", "eps"), [("zoo/xxlarge/convnext-large-d-320", 1e-6), ("zoo/openclip-convnext-xxlarge", 1e-5)]
)
def test_the_largest_convnext_has_another_constant_at_any_width(name, eps, plain, tmp_path):
    given = folder(plain, tmp_path / "given", "mini_gemini", config={"mm_vision_tower_aux": name})
    convert(given, tmp_path / "ours")
    assert loaded(tmp_path / "ours").config.encoders[1]["norm_eps"] == eps


def test_what_an_authors_code_has_no_choice_about_is_not_lost_in_silence(plain, tmp_path):
    given = folder(plain, tmp_path / "given", "mini_gemini")
    smooth = {"resize": "bilinear_antialias"}
    convert(
        given,
        tmp_path / "ours",
        change=lambda raw: {**raw, "encoders": [{**raw["encoders"][0], **smooth}, raw["encoders"][1]]},
    )
    loaded(tmp_path / "ours").save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match=r"encoders\.0\.resize is 'bilinear_antialias', there always"):
        export(tmp_path / "trained", tmp_path / "back", "mini_gemini")


def test_eva02s_rotations_tell_which_blocks_are_global(tmp_path):
    sizes = [4, 16, 4, 4, 16]
    rope = {f"t.blocks.{i}.attn.rope.freqs_cos": ONES(cells, 4) for i, cells in enumerate(sizes)}
    given = PublishedFolder(written(tmp_path / "all", rope, {}), tmp_path)
    assert _eva02_global(given, "t.", 5, 16) == [1, 4]
    del rope["t.blocks.3.attn.rope.freqs_cos"]
    given = PublishedFolder(written(tmp_path / "some", rope, {}), tmp_path)
    assert _eva02_global(given, "t.", 5, 16) == [2]


# -- what the tensors' types and ties are --


@pytest.mark.parametrize(
    ("tower", "rest", "widest"),
    [
        (torch.float32, torch.bfloat16, "float32"),
        (torch.float32, torch.float16, "float32"),
        (torch.float16, torch.bfloat16, "float32"),  # neither holds the other
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
    ],
)
def test_no_tensor_of_a_mixed_folder_loses_bits_when_loaded(tower, rest, widest, plain, tmp_path):
    cast = {
        name: value.to(tower if "vision_tower" in name else rest) for name, value in plain["llava"][0].items()
    }
    convert(folder(plain, tmp_path / "given", tensors=cast), tmp_path / "ours")
    model, stored = loaded(tmp_path / "ours"), load_file(tmp_path / "ours" / "model.safetensors")
    assert str(model.dtype) == f"torch.{widest}"
    found = model.state_dict()
    assert all(torch.equal(found[name].double(), value.double()) for name, value in stored.items())


def test_a_tied_head_may_be_stored_without_the_embeddings(plain, tmp_path):
    tied = {"tie_word_embeddings": True}
    usual = folder(plain, tmp_path / "usual", config=tied, without="lm_head.")
    head = {"lm_head.weight": plain["llava"][0]["model.embed_tokens.weight"]}
    given = folder(plain, tmp_path / "given", tensors=head, config=tied, without="model.embed_tokens.")
    for source, target in ((usual, "one"), (given, "other")):
        convert(source, tmp_path / target)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    language = loaded(tmp_path / "other").model.language_model
    assert language.lm_head.weight is language.model.embed_tokens.weight
    export(tmp_path / "other", tmp_path / "back", "llava")
    assert same(given, tmp_path / "back")
    alone = folder(plain, tmp_path / "alone", tensors=head, without="model.embed_tokens.")
    with pytest.raises(CheckpointError, match=r"missing: \S+\.embed_tokens\.weight"):
        convert(alone, tmp_path / "no")


# -- transformers' layout --


def peer(tokens=16, **options):
    vision = CLIPVisionConfig(
        hidden_size=CHANNELS,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**text_config()),
            image_token_index=60,
            image_seq_length=tokens,
            **options,
        )
    ).eval()


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"multimodal_projector_bias": False}, 16),
        ({"vision_feature_select_strategy": "full"}, 17),
        ({"tie_word_embeddings": True}, 16),
        ({"vision_feature_layer": [-3]}, 16),
    ],
)
@torch.no_grad()
def test_options_of_transformers_llava_mean_the_same_here(options, tokens, tmp_path):
    theirs = peer(tokens, **options)
    theirs.save_pretrained(tmp_path / "given")
    convert(tmp_path / "given", tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    settings = model.model.encoders[0].settings
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (settings.mean, settings.std))
    ids, pixels = torch.tensor([[2, 5, *[60] * tokens, 7]]), torch.rand(1, 3, 32, 32)
    expected = theirs(input_ids=ids, pixel_values=(pixels - mean) / std).logits
    found = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", "llava_hf")
    convert(tmp_path / "written", tmp_path / "again")
    assert torch.equal(loaded(tmp_path / "again")(input_ids=ids, pixel_values=pixels).logits, found)


@pytest.mark.parametrize(
    ("change", "template"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"vocab_size": 32064}, "vicuna"),
        ({"vocab_size": 64064}, "chatml"),
        ({"vocab_size": 128320}, "llama3"),
    ],
)
def test_the_template_follows_the_decoder_also_with_tokens_added(change, template, tmp_path):
    peer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FAMILIES.get("llava_hf").read(PublishedFolder(tmp_path, tmp_path)).chat_template == template


# -- what nothing can be made of --


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        ("llava", {"hidden_size": "large"}, "config.json: a value in it cannot be used"),
        ("llava", {"num_attention_heads": 0}, "config.json: a value"),
        ("llava", {"hidden_act": "none"}, "config.json: a value"),
        ("llava", {"vocab_size": None}, "config.json: a value"),
        ("llava", {"mm_vision_select_layer": None}, "config.json: a value"),
        ("llava", {"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls'"),
        ("llava", {**CANVASES, "image_grid_pinpoints": "(1x1),...,(6x6)"}, "config.json: a value"),
        ("llava", {**CANVASES, "image_grid_pinpoints": [[20, 32]]}, "no whole number of tiles of 16"),
        ("llava", {"s2": True}, "s2"),
        ("mini_gemini", {"image_size_aux": "large"}, "config.json: a value"),
        ("mini_gemini", {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    ],
)
def test_a_value_that_means_nothing_is_named(family, config, match, plain, tmp_path):
    given = folder(plain, tmp_path / "given", family, config=config)
    with pytest.raises(CheckpointError, match=match):
        convert(given, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_several_layers_of_transformers_llava_are_refused(tmp_path):
    peer(vision_feature_layer=[-2, -1]).save_pretrained(tmp_path / "given")
    with pytest.raises(CheckpointError, match="only one layer"):
        convert(tmp_path / "given", tmp_path / "ours")


def test_eight_bits_and_numbers_that_are_not_finite_are_refused_wherever_they_are(plain, tmp_path):
    unread = "model.vision_tower.vision_tower.vision_model.encoder.layers.2.layer_norm1.bias"
    wrong = {
        "F8_E4M3": {"lm_head.weight": BIG.to(torch.float8_e4m3fn)},
        "lm_head.weight holds": {"lm_head.weight": BIG / 0},
        f"{unread} holds": {unread: torch.full((CHANNELS,), float("nan"))},
    }
    for match, tensors in wrong.items():
        given = folder(plain, tmp_path / "given", tensors=tensors)
        with pytest.raises(CheckpointError, match=match):
            convert(given, tmp_path / "ours")
    usual, config = plain["llava"]
    given = written(tmp_path / "bin", {**usual, "lm_head.weight": BIG / 0}, config, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"bin/pytorch_model\.bin: lm_head\.weight holds"):
        convert(given, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "given"]
