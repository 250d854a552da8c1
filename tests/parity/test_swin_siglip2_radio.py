"""Swin, SigLIP 2 and RADIO against transformers' and timm's own models, through files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from transformers import (
    RadioConfig,
    RadioModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
)

from tests.parity.test_encoders import EDITS, IDENTITY, OURS, SIZES, TEXT, build, edit, loaded, random_model
from vlmix.core.errors import CheckpointError, PlanError
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap
from vlmix.encoders.radio import RadioSettings
from vlmix.encoders.siglip import SiglipSettings
from vlmix.encoders.siglip2 import Siglip2Settings
from vlmix.encoders.swin import SwinSettings

pytestmark = pytest.mark.parity

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SWIN = {"depths": (1, 2, 3, 2), "width": 4, "heads": (1, 2, 2, 4), "mlp_ratio": 2.0, "patch_size": 2}


def swin_config(size=48, window=3):
    return SwinConfig(
        image_size=size,
        patch_size=2,
        embed_dim=4,
        depths=[1, 2, 3, 2],
        num_heads=[1, 2, 2, 4],
        window_size=window,
        mlp_ratio=2.0,
    )


def swin_stages(theirs, pixels):
    """Each stage's map before it is halved, the last one normed."""
    with torch.no_grad():
        x, grid = theirs.embeddings(pixels)
        maps = theirs.encoder(
            x, grid, output_hidden_states=True, output_hidden_states_before_downsampling=True
        ).reshaped_hidden_states[1:]
        last = FeatureMap(theirs(pixels).last_hidden_state, tuple(maps[-1].shape[2:])).to_nchw()
    return [*maps[:-1], last]


@pytest.mark.parametrize("size", [48, 56])  # 56: no stage is a whole number of windows, one grid is odd
@pytest.mark.parametrize("stages", [(3,), (2,), (0,), (1, 3), (0, 1, 2, 3)])
def test_swin_gives_transformers_stages(tmp_path, size, stages):
    classifier = random_model(SwinForImageClassification, swin_config(size))
    classifier.save_pretrained(tmp_path)
    number = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    edit(tmp_path, lambda tensors: tensors.update({number: torch.zeros(81, dtype=torch.int64)}))
    pixels = torch.rand(2, 3, size, size)
    maps = [swin_stages(classifier.swin, pixels)[stage] for stage in stages]
    grid = tuple(maps[0].shape[2:])
    expected = torch.cat([F.interpolate(m, size=grid, mode="bilinear", align_corners=False) for m in maps], 1)
    part = loaded(SwinSettings(**SWIN, image_size=size, window=3, stages=stages, **IDENTITY), tmp_path)
    out = part(pixels)
    assert part.spec.blocks == (sum(SWIN["depths"][: stages[0] + 1]) if len(stages) == 1 else 1)
    assert len(part.tower.encoder.layers) == stages[-1] + 1
    torch.testing.assert_close(out.to_nchw(), expected, atol=2e-5, rtol=1e-5)
    plain = loaded(
        SwinSettings(**SWIN, image_size=size, window=3, stages=stages, final_norm=False, **IDENTITY), tmp_path
    )
    assert torch.equal(plain(pixels).tokens, out.tokens) == (stages[-1] < 3)


def test_swin_resamples_tables_made_for_another_window(tmp_path):
    small, large = (random_model(SwinModel, swin_config(window=window)) for window in (2, 3))
    small.save_pretrained(tmp_path, save_original_format=False)
    state = small.state_dict()
    for key in (key for key in state if key.endswith("bias_table")):
        table = state[key].T.reshape(1, -1, 3, 3)
        state[key] = F.interpolate(table, size=(5, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    large.load_state_dict(state)
    pixels = torch.rand(2, 3, 48, 48)
    part = loaded(SwinSettings(**SWIN, image_size=48, window=3, table_window=2, **IDENTITY), tmp_path)
    torch.testing.assert_close(part(pixels).to_nchw(), swin_stages(large, pixels)[3], atol=2e-5, rtol=1e-5)


def test_swin_drop_path_grows_over_the_whole_network_and_acts_in_training_only():
    part = build(SwinSettings.tiny().model_copy(update={"drop_path": 0.9, "stages": (2,)}))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in part.tower.encoder.layers[1].blocks]
    assert rates == pytest.approx([0.225, 0.45])
    pixels = torch.rand(4, 3, 56, 56)
    assert torch.equal(part(pixels).tokens, part(pixels).tokens)
    part.train()
    assert not torch.equal(part(pixels).tokens, part(pixels).tokens)


def test_siglip_loads_siglip_2_of_fixed_resolution(tmp_path):
    """Its text side, with a vocabulary and an output width of its own, is what differs from SigLIP's file."""
    text = {**TEXT, "vocab_size": 40, "projection_size": 16}
    vision = SiglipVisionConfig(**SIZES, intermediate_size=32)
    theirs = random_model(SiglipModel, SiglipConfig(vision_config=vision.to_dict(), text_config=text))
    assert theirs.text_model.head.weight.shape == (16, 8)
    theirs.save_pretrained(tmp_path)
    part = loaded(SiglipSettings(**OURS, mlp=32, **IDENTITY), tmp_path)
    torch.testing.assert_close(part(PIXELS).tokens, theirs.vision_model(PIXELS).last_hidden_state)
    wrong = build(Siglip2Settings(**OURS, mlp=32, table_size=None))
    with pytest.raises(CheckpointError, match="'siglip_vision_model', here 'siglip2_vision_model'"):
        wrong.load_weights(str(tmp_path))


def siglip2_model(composite, patches=16):
    config = Siglip2VisionConfig(
        **{key: SIZES[key] for key in SIZES if key != "image_size"}, intermediate_size=32, num_patches=patches
    )
    if not composite:
        return random_model(Siglip2VisionModel, config)
    return random_model(Siglip2Model, Siglip2Config(vision_config=config.to_dict(), text_config=TEXT))


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("patches", [16, 9])  # 9: the table is resampled
@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip2_gives_transformers_hidden_states(tmp_path, composite, patches, layer):
    theirs = siglip2_model(composite, patches)
    theirs.save_pretrained(tmp_path)
    sizes = {**OURS, "mlp": 32, "table_size": 8 * int(patches**0.5), "feature_layer": layer}
    levels = (PIXELS * 255).round().to(torch.uint8)
    given = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)(list(levels), return_tensors="pt")
    vision = theirs.vision_model if composite else theirs
    with torch.no_grad():
        expected = vision(**given, output_hidden_states=True).hidden_states[layer]
    part = loaded(Siglip2Settings(**sizes, final_norm=False), tmp_path)
    torch.testing.assert_close(part(levels).tokens, expected, atol=1e-5, rtol=1e-5)
    normed = loaded(Siglip2Settings(**sizes), tmp_path)
    torch.testing.assert_close(normed(levels).tokens, vision.post_layernorm(expected), atol=1e-5, rtol=1e-5)


def radio_model(folder):
    config = RadioConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=8,
        max_img_size=48,
        num_cls_tokens=3,
        num_registers=2,
        summary_idxs=[0, 2],
    )
    theirs = random_model(RadioModel, config)
    theirs.save_pretrained(folder)
    return theirs


RADIO = {**OURS, "mlp": 32, "table_size": 48, "registers": 2, "summary_tokens": (0, 2), "layer_scale": 1.0}


@pytest.mark.parametrize("layer", [-1, 2])
def test_radio_gives_transformers_features_and_summary(tmp_path, layer):
    theirs = radio_model(tmp_path)
    with torch.no_grad():
        states = theirs(PIXELS, output_hidden_states=True).hidden_states[layer]
    part = loaded(RadioSettings(**RADIO, feature_layer=layer), tmp_path)
    torch.testing.assert_close(part(PIXELS).tokens, states[:, 5:], atol=1e-5, rtol=1e-5)
    both = loaded(RadioSettings(**RADIO, feature_layer=layer, summary="append"), tmp_path)(PIXELS).tokens
    summary = states[:, [0, 2]].flatten(1)
    torch.testing.assert_close(both[..., :16], states[:, 5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[..., 16:], summary[:, None].expand(-1, 16, -1), atol=1e-5, rtol=1e-5)
    if layer == -1:
        torch.testing.assert_close(theirs(PIXELS).summary, summary)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_radio_reads_the_authors_names_as_timm_does(tmp_path, corners, scaled):
    """timm's reader of published C-RADIO files was written apart from ours and from transformers'."""
    radio_model(tmp_path)

    def as_published(tensors):
        for key in [key for key in tensors if ".layer_scale" in key]:
            value = tensors.pop(key)
            if scaled:
                tensors[key.replace("layer_scale", "ls").replace("lambda1", "grandma")] = value

    edit(tmp_path, as_published)
    theirs = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=4,
        num_heads=2,
        mlp_ratio=2,
        init_values=1.0 if scaled else None,
        reg_tokens=4,
        no_embed_class=True,
        final_norm=False,
        num_classes=0,
    ).eval()
    published = load_file(tmp_path / "model.safetensors")
    found = checkpoint_filter_fn(
        published, theirs, interpolation="bilinear", antialias=False, align_corners=corners
    )
    theirs.load_state_dict(found)
    settings = {**RADIO, "layer_scale": 1.0 if scaled else None, **IDENTITY}
    part = loaded(RadioSettings(**settings, table_corners=corners), tmp_path)
    with torch.no_grad():
        expected = theirs.forward_features(PIXELS)[:, 5:]
    torch.testing.assert_close(part(PIXELS).tokens, expected, atol=1e-5, rtol=1e-5)


SAVED = {
    "swin": lambda folder: random_model(SwinModel, swin_config()).save_pretrained(folder),
    "siglip2": lambda folder: siglip2_model(composite=False).save_pretrained(folder),
    "radio": radio_model,
}
FITTING = {
    "swin": SwinSettings(**SWIN, image_size=48, window=3),
    "siglip2": Siglip2Settings(**OURS, mlp=32, table_size=32),
    "radio": RadioSettings(**RADIO),
}
NORMS = {  # as stored, as ours
    "swin": ("encoder.layers.1.blocks.0.layernorm_before.weight",) * 2,
    "siglip2": ("encoder.layers.1.layer_norm1.weight",) * 2,
    "radio": ("radio_model.model.blocks.1.norm1.weight", "blocks.1.norm1.weight"),
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("words", EDITS)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, kind, words):
    SAVED[kind](tmp_path)
    stored, ours = NORMS[kind]
    edit(tmp_path, lambda tensors: EDITS[words](tensors, stored))
    with pytest.raises(CheckpointError, match=words.format(ours.replace(".", r"\."))):
        loaded(FITTING[kind], tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("swin", {"window": 2}, "of another shape: .*relative_position_bias_table"),
        ("swin", {"heads": (1, 2, 4, 4)}, "of another shape: .*relative_position_bias_table"),
        ("swin", {"depths": (1, 2, 4, 2)}, r"missing: encoder\.layers\.2\.blocks\.3"),
        ("swin", {"depths": (1, 2, 2, 2)}, r"left over: encoder\.layers\.2\.blocks\.2"),
        ("siglip2", {"heads": 4}, "num_attention_heads is 2, here 4"),
        ("siglip2", {"layers": 3}, "num_hidden_layers is 4, here 3"),
        ("siglip2", {"table_size": 24}, "of another shape: embeddings.position_embedding"),
        ("radio", {"registers": 3}, "of another shape: tokens"),
        ("radio", {"layers": 3}, r"left over: blocks\.3"),
        ("radio", {"layer_scale": None}, r"left over: blocks\.0\.ls1\.gamma"),
    ],
)
def test_other_sizes_than_the_file_has_are_refused(tmp_path, kind, change, words):
    SAVED[kind](tmp_path)
    with pytest.raises(CheckpointError, match=words):
        loaded(FITTING[kind].model_copy(update=change), tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SwinSettings(image_size=383), "no multiple of patch_size 4; take 380 and 384"),
        (SwinSettings(image_size=224), "stage 3 has 7 x 7 cells, fewer than the window of 12"),
        (SwinSettings(heads=(4, 8, 16, 48)), "stage 3 has 1024 channels, no multiple of 48 heads"),
        (SwinSettings(stages=(3, 0)), "stages must be"),
        (SwinSettings(stages=()), "stages must be"),
        (Siglip2Settings(image_size=250), "image_size 250 is no multiple of patch_size 16"),
        (Siglip2Settings(table_size=250), "table_size 250 is no multiple of patch_size 16"),
        (RadioSettings(summary="append", summary_tokens=(0, 3)), r"\[0, 3\] must be some of 0 to 2"),
        (RadioSettings(summary="append", summary_tokens=()), "must be some of 0 to 2"),
        (RadioSettings(heads=7), "no multiple of heads 7"),
    ],
)
def test_the_plan_refuses_what_cannot_be_built(settings, words):
    with pytest.raises(PlanError, match=words):
        ENCODERS.get(settings.kind).plan(settings)


def test_published_sizes_plan_as_published():
    def facts(settings):
        spec = ENCODERS.get(settings.kind).plan(settings)
        return spec.grid, spec.channels, spec.blocks, spec.token_blocks

    assert facts(SwinSettings()) == ((12, 12), 1024, 24, False)
    assert facts(SwinSettings(stages=(0, 1, 2, 3))) == ((96, 96), 1920, 1, False)
    assert facts(SwinSettings(stages=(0,), image_size=224)) == ((56, 56), 128, 2, False)
    assert facts(Siglip2Settings()) == ((16, 16), 1152, 27, True)
    assert facts(Siglip2Settings(image_size=512)) == ((32, 32), 1152, 27, True)
    assert facts(RadioSettings()) == ((32, 32), 1280, 32, True)
    assert facts(RadioSettings(summary="append")) == ((32, 32), 3840, 32, False)
