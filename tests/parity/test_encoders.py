"""Encoders against the models they adapt, through files: published layout in, the same features out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmix.core.errors import CheckpointError, PlanError
from vlmix.core.parts import ENCODERS
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD, encoder_input
from vlmix.encoders.clip import ClipSettings
from vlmix.encoders.convnext import ConvnextSettings
from vlmix.encoders.dinov2 import Dinov2Settings
from vlmix.encoders.siglip import SiglipSettings

pytestmark = pytest.mark.parity

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
OURS = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 4, "heads": 2}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(settings):
    return ENCODERS.get(settings.kind)(settings).eval()


def loaded(settings, folder):
    part = build(settings)
    part.load_weights(str(folder))
    return part


def random_model(cls, config):
    torch.manual_seed(3)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def vision(model):
    return model.vision_model if isinstance(model, CLIPModel | SiglipModel) else model


def hidden_states(model, pixels):
    with torch.no_grad():
        return vision(model)(pixels, output_hidden_states=True).hidden_states


def clip_model(composite):
    config = CLIPVisionConfig(**SIZES, intermediate_size=32)
    if not composite:
        return random_model(CLIPVisionModel, config)
    whole = CLIPConfig(vision_config=config.to_dict(), text_config=TEXT, projection_dim=8)
    return random_model(CLIPModel, whole)


def siglip_model(composite):
    config = SiglipVisionConfig(**SIZES, intermediate_size=32)
    if not composite:
        return random_model(SiglipVisionModel, config)
    return random_model(SiglipModel, SiglipConfig(vision_config=config.to_dict(), text_config=TEXT))


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, 1, 4])
def test_clip_gives_transformers_hidden_states(tmp_path, composite, layer):
    theirs = clip_model(composite)
    theirs.save_pretrained(tmp_path)
    part = loaded(ClipSettings(**OURS, mlp=32, feature_layer=layer, **IDENTITY), tmp_path)
    expected = hidden_states(theirs, PIXELS)[layer][:, 1:]
    torch.testing.assert_close(part(PIXELS).tokens, expected)
    assert len(part.tower.encoder.layers) == (layer if layer > 0 else 5 + layer)


def test_clip_without_its_class_token_from_the_start(tmp_path):
    theirs = clip_model(composite=False)
    theirs.save_pretrained(tmp_path)
    settings = ClipSettings(**OURS, mlp=32, feature_layer=-1, class_token="drop_before", **IDENTITY)
    part = loaded(settings, tmp_path)
    with torch.no_grad():
        x = theirs.pre_layrnorm(theirs.embeddings(PIXELS)[:, 1:])
        for layer in theirs.encoder.layers:
            x = layer(x, None)
    torch.testing.assert_close(part(PIXELS).tokens, x)
    part(PIXELS).tokens.sum().backward()
    assert part.inert_parameters == ("tower.embeddings.class_embedding",)
    assert part.tower.embeddings.class_embedding.grad is None


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, 3])
def test_siglip_gives_transformers_hidden_states(tmp_path, composite, layer):
    theirs = siglip_model(composite)
    theirs.save_pretrained(tmp_path)
    expected = hidden_states(theirs, PIXELS)[layer]
    sizes = {**OURS, "mlp": 32, "feature_layer": layer, **IDENTITY}
    plain = loaded(SiglipSettings(**sizes, final_norm=False), tmp_path)
    torch.testing.assert_close(plain(PIXELS).tokens, expected)
    normed = loaded(SiglipSettings(**sizes), tmp_path)
    torch.testing.assert_close(normed(PIXELS).tokens, vision(theirs).post_layernorm(expected))


def test_siglip_leaves_the_margin_that_no_patch_covers(tmp_path):
    config = SiglipVisionConfig(**{**SIZES, "image_size": 38}, intermediate_size=32)
    theirs = random_model(SiglipVisionModel, config)
    theirs.save_pretrained(tmp_path)
    part = loaded(SiglipSettings(**{**OURS, "image_size": 38}, mlp=32, **IDENTITY), tmp_path)
    pixels = torch.rand(1, 3, 38, 38)
    assert part.spec.grid == (4, 4)
    torch.testing.assert_close(part(pixels).tokens, theirs(pixels).last_hidden_state)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("layer", [-1, -3])
def test_dinov2_gives_transformers_hidden_states(tmp_path, registers, swiglu, layer):
    sizes = {**SIZES, "mlp_ratio": 2, "use_swiglu_ffn": swiglu}
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        theirs = random_model(Dinov2WithRegistersModel, config)
    else:
        theirs = random_model(Dinov2Model, Dinov2Config(**sizes))
    theirs.save_pretrained(tmp_path)
    expected = hidden_states(theirs, PIXELS)[layer][:, 1 + registers :]
    ours = {**OURS, "mlp": 32, "registers": registers, "swiglu": swiglu, "feature_layer": layer, **IDENTITY}
    plain = loaded(Dinov2Settings(**ours, final_norm=False), tmp_path)
    torch.testing.assert_close(plain(PIXELS).tokens, expected)
    normed = loaded(Dinov2Settings(**ours), tmp_path)
    torch.testing.assert_close(normed(PIXELS).tokens, theirs.layernorm(expected))


DEPTHS, WIDTHS = (1, 2, 2, 1), (4, 6, 8, 10)


def save_convnext(folder, naming):
    torch.manual_seed(4)
    theirs = ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=7, ls_init_value=1.0).eval()
    state = {key: value + torch.randn_like(value) * 0.2 for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    if naming == "open_clip":
        trunk = {
            f"visual.trunk.{key}": value for key, value in state.items() if not key.startswith("head.fc")
        }
        side = {"visual.head.mlp.fc1.weight": torch.ones(2), "logit_scale": torch.ones(1)}
        text = {"text.transformer.a": torch.ones(1), "positional_embedding": torch.ones(1)}
        save_file({**trunk, **side, **text}, folder / "open_clip_model.safetensors")
    else:
        save_file(state, folder / "model.safetensors")
    return theirs


@pytest.mark.parametrize("naming", ["timm", "open_clip"])
@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (3,), (1, 3), (0,), (0, 2)])
def test_convnext_gives_timm_features(tmp_path, naming, stages):
    theirs = save_convnext(tmp_path, naming)
    settings = ConvnextSettings(image_size=64, depths=DEPTHS, widths=WIDTHS, stages=stages, **IDENTITY)
    part = loaded(settings, tmp_path)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = [theirs.forward_intermediates(pixels, intermediates_only=True)[stage] for stage in stages]
    size = maps[0].shape[-2:]
    expected = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], 1)
    out = part(pixels)
    torch.testing.assert_close(out.to_nchw(), expected)
    assert part.spec.blocks == (stages[0] + 1 if len(stages) == 1 else 1)
    assert len(part.tower.stages) == stages[-1] + 1


def test_convnext_drop_path_acts_in_training_only():
    settings = ConvnextSettings.tiny().model_copy(update={"drop_path": 0.9})
    part, pixels = build(settings), torch.rand(4, 3, 32, 32)
    assert torch.equal(part(pixels).tokens, part(pixels).tokens)
    part.train()
    assert not torch.equal(part(pixels).tokens, part(pixels).tokens)


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


EDITS = {
    "missing: {}": lambda tensors, name: tensors.pop(name),
    "left over: {}_new": lambda tensors, name: tensors.update({name + "_new": torch.ones(1)}),
    r"of another shape: {} \(1,\)": lambda tensors, name: tensors.update({name: torch.ones(1)}),
}


@pytest.mark.parametrize("kind", ["clip", "siglip", "convnext"])
@pytest.mark.parametrize("words", EDITS)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, kind, words):
    if kind == "convnext":
        save_convnext(tmp_path, "timm")
        name = "stages.1.blocks.0.norm.weight"
        settings = ConvnextSettings(image_size=64, depths=DEPTHS, widths=WIDTHS)
    else:
        {"clip": clip_model, "siglip": siglip_model}[kind](composite=False).save_pretrained(tmp_path)
        name = "encoder.layers.1.layer_norm1.weight"
        settings = {"clip": ClipSettings, "siglip": SiglipSettings}[kind](**OURS, mlp=32)
    stored = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith(name))
    edit(tmp_path, lambda tensors: EDITS[words](tensors, stored))
    part = build(settings)
    before = {key: value.clone() for key, value in part.state_dict().items()}
    with pytest.raises(CheckpointError, match=words.format(name.replace(".", r"\."))):
        part.load_weights(str(tmp_path))
    assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 4}, "num_attention_heads is 2, here 4"),
        ({"layers": 3}, "num_hidden_layers is 4, here 3"),
        ({"activation": "gelu"}, "hidden_act is 'quick_gelu', here 'gelu'"),
        ({"image_size": 64}, "image_size is 32, here 64"),
    ],
)
def test_sizes_that_shapes_cannot_show_are_compared(tmp_path, change, words):
    clip_model(composite=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        loaded(ClipSettings(**{**OURS, "mlp": 32, **change}), tmp_path)


@pytest.mark.parametrize("kind", ENCODERS.names())
def test_a_source_that_is_no_model_is_refused(tmp_path, kind):
    part = build(ENCODERS.get(kind).settings_class.tiny())
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=tmp_path.name):
            part.load_weights(str(source))


def test_pickled_weights_are_refused(tmp_path):
    theirs = clip_model(composite=False)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        loaded(ClipSettings(**OURS, mlp=32), tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    siglip_model(composite=False).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="model_type is 'siglip_vision_model', here 'clip_vision_model'"
    ):
        loaded(ClipSettings(**OURS, mlp=32), tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ClipSettings(image_size=335), "no multiple of patch_size 14; take 322 and 336"),
        (ClipSettings(image_size=7), "take 14"),
        (ClipSettings(feature_layer=25), "feature_layer 25 does not exist in 24 layers"),
        (SiglipSettings(feature_layer=0), "feature_layer 0"),
        (Dinov2Settings(feature_layer=-25), "feature_layer -25"),
        (Dinov2Settings(mlp=1000), "mlp 1000"),
        (SiglipSettings(heads=7), "no multiple of heads 7"),
        (ConvnextSettings(image_size=100), "no multiple of 32, the stride of stage 3; take 96 and 128"),
        (ConvnextSettings(stages=()), "stages must be"),
        (ConvnextSettings(stages=(1, 1)), "stages must be"),
        (ConvnextSettings(stages=(3, 0)), "stages must be"),
        (ConvnextSettings(stages=(4,)), "stages must be"),
    ],
)
def test_the_plan_refuses_what_cannot_be_built(settings, words):
    with pytest.raises(PlanError, match=words):
        ENCODERS.get(settings.kind).plan(settings)


def test_published_sizes_plan_as_published():
    plans = {s: ENCODERS.get(s.kind).plan(s) for s in (ClipSettings(), SiglipSettings(), Dinov2Settings())}
    assert [(spec.tokens, spec.channels, spec.blocks) for spec in plans.values()] == [
        (576, 1024, 23),
        (729, 1152, 27),
        (1369, 1024, 24),
    ]
    convnext = ENCODERS.get("convnext")
    everything, last = convnext.plan(ConvnextSettings()), convnext.plan(ConvnextSettings(stages=(3,)))
    assert (everything.grid, everything.channels) == ((192, 192), 2880)
    assert (last.grid, last.channels) == ((24, 24), 1536)


def test_pixels_are_resized_in_float32_and_never_clamped():
    modes = {
        "bilinear": {"mode": "bilinear"},
        "bilinear_corners": {"mode": "bilinear", "align_corners": True},
        "bilinear_antialias": {"mode": "bilinear", "antialias": True},
        "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    }
    pixels = torch.randn(1, 3, 50, 50) * 3
    for resize, arguments in modes.items():
        settings = ClipSettings(image_size=28, resize=resize)
        expected = F.interpolate(pixels, size=(28, 28), **arguments)
        expected = (expected - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        torch.testing.assert_close(encoder_input(pixels, settings, torch.float32), expected)
        half = encoder_input(pixels, settings, torch.bfloat16)
        assert torch.equal(half, expected.bfloat16())
    same = encoder_input(pixels, ClipSettings(image_size=50, **IDENTITY), torch.float32)
    assert torch.equal(same, pixels)


def test_a_sharded_folder_loads(tmp_path):
    theirs = clip_model(composite=False)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    settings = ClipSettings(**OURS, mlp=32)
    one, other = (loaded(settings, tmp_path / name) for name in ("whole", "shards"))
    assert torch.equal(one(PIXELS).tokens, other(PIXELS).tokens)
