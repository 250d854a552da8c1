"""``vlmix convert --drop-encoder``: the smaller model is the larger one seeing zeros; and training for it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import PLACEHOLDER, part, text_config
from vlmix.cli.main import app
from vlmix.convert.drop import drop_encoder
from vlmix.core.errors import CheckpointError, RecipeError
from vlmix.core.files import verify_manifest
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS, read_part
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration

pytestmark = pytest.mark.flow

EYES = ["clip", "convnext", "dinov2"]
IDS = torch.tensor([[2, 5, 7, 11, 13]])
EXPERTS = [{"place": place, "layers": "all"} for place in ("encoders.1", "language_model")]


def saved(folder, fusion, projector="mlp", eyes=EYES, experts=None):
    torch.manual_seed(0)
    config = VlmixConfig(
        text_config=text_config(),
        encoders=[part(ENCODERS, eye) for eye in eyes],
        fusion=fusion,
        projector=part(PROJECTORS, projector),
        experts=experts,
        image_size=32,
        image_token_id=PLACEHOLDER,
    )
    model = VlmixForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def answers(model):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.cat((torch.full((1, model.config.image_seq_length), PLACEHOLDER), IDS), dim=1)
    return model(input_ids=ids, pixel_values=pixels).logits


def blinded(model, index):
    """The model with one encoder's channels set to zero."""
    channels = [spec.channels for spec in model.config.plan().encoders]
    columns = slice(sum(channels[:index]), sum(channels[: index + 1]))

    def blind(fusion, inputs, found):
        tokens = found.tokens.clone()
        tokens[..., columns] = 0
        return FeatureMap(tokens, found.grid)

    model.model.fusion.register_forward_hook(blind)
    return model


@pytest.mark.parametrize("projector", ["mlp", "linear"])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_the_smaller_model_is_the_larger_one_that_sees_zeros(norm, index, projector, tmp_path):
    model = saved(tmp_path / "large", {"kind": "channel_concat", "norm": norm}, projector)
    channels = drop_encoder(tmp_path / "large", tmp_path / "small", index)
    assert channels == model.config.plan().encoders[index].channels
    verify_manifest(tmp_path / "small")
    small = VlmixForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    kinds = [eye for number, eye in enumerate(EYES) if number != index]
    assert [part.kind for part in small.config.encoder_settings()] == kinds
    assert small.config.plan().fused.grid == model.config.plan().fused.grid
    seeing, blind = answers(model), answers(blinded(model, index))
    # 1e-6: the sums of the first layer's rows lose zeros, which changes their order
    torch.testing.assert_close(answers(small), blind, atol=1e-6, rtol=0)
    assert (seeing - blind).abs().max() > 1e-3


@pytest.mark.parametrize("index", [0, 1])
def test_experts_go_and_move_with_the_encoder_they_are_in(index, tmp_path):
    model = saved(tmp_path / "large", {"kind": "channel_concat"}, eyes=["clip", "dinov2"], experts=EXPERTS)
    drop_encoder(tmp_path / "large", tmp_path / "small", index)
    small = VlmixForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    places = [mixture.place for mixture in small.config.expert_settings()]
    assert places == (["encoders.0", "language_model"] if index == 0 else ["language_model"])
    torch.testing.assert_close(answers(small), answers(blinded(model, index)), atol=1e-6, rtol=0)


def test_a_projector_of_experts_is_not_cut(tmp_path):
    saved(tmp_path / "large", {"kind": "channel_concat"}, eyes=["clip", "dinov2"])
    config = json.loads((tmp_path / "large/config.json").read_text())
    (tmp_path / "large/config.json").write_text(json.dumps({**config, "experts": [{"place": "projector"}]}))
    with pytest.raises(CheckpointError, match="the projector holds experts"):
        drop_encoder(tmp_path / "large", tmp_path / "small", 0)


def test_everything_else_comes_along_but_not_the_way_back(tmp_path):
    saved(tmp_path / "large", {"kind": "channel_concat"})
    (tmp_path / "large" / "tokenizer.json").write_text("{}")
    (tmp_path / "large" / "published").mkdir()
    (tmp_path / "large" / "published" / "reading.json").write_text("{}")
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "large"), str(tmp_path / "small"), "--drop-encoder", "0"]
    )
    assert result.exit_code == 0, result.exception
    assert "left out with its 16 channels" in result.stdout
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "manifest.json"} <= names
    assert "published" not in names
    raw = json.loads((tmp_path / "small" / "config.json").read_text())
    assert raw["fusion"]["grid"] == [4, 4]


def test_what_cannot_be_cut_out_is_refused(tmp_path):
    saved(tmp_path / "concat", {"kind": "channel_concat"}, eyes=["clip", "convnext"])
    saved(tmp_path / "one", {"kind": "channel_concat"}, eyes=["clip"])
    saved(tmp_path / "mining", {"kind": "patch_mining"}, eyes=["clip", "convnext"])
    saved(tmp_path / "shuffle", {"kind": "channel_concat"}, "pixel_shuffle", eyes=["clip", "convnext"])
    cases = {
        ("concat", 2): "0 clip, 1 convnext",
        ("concat", -1): "no such encoder",
        ("one", 0): "only encoder",
        ("mining", 0): "channel_concat meets .* this model has patch_mining",
        ("shuffle", 0): "this model has channel_concat and pixel_shuffle",
    }
    for (name, index), message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            drop_encoder(tmp_path / name, tmp_path / "small", index)
        assert not (tmp_path / "small").exists()


def fusion(share, norm=False):
    raw = {"kind": "channel_concat", "encoder_dropout": share, "norm": norm}
    specs = [VisionSpec((2, 2), 3), VisionSpec((4, 4), 5), VisionSpec((2, 2), 7)]
    settings = read_part(FUSIONS, raw)
    return FUSIONS.get("channel_concat")(settings, specs), specs


def merged(part, specs, pictures):
    maps = [FeatureMap(torch.ones(pictures, spec.tokens, spec.channels), spec.grid) for spec in specs]
    return part.merge(maps).tokens


def test_encoders_are_lost_in_training_only_at_the_asked_rate_and_never_all():
    torch.manual_seed(0)
    (part, specs), pictures = fusion(0.4), 20_000
    assert bool((merged(part.eval(), specs, 3) == 1).all())
    tokens = merged(part.train(), specs, pictures)
    eyes = tokens.split([spec.channels for spec in specs], dim=-1)
    assert all(bool(((eye == 0) | (eye == 1)).all()) for eye in eyes)
    kept = torch.stack([eye.flatten(1).amin(1) for eye in eyes])
    assert torch.equal(kept, torch.stack([eye.flatten(1).amax(1) for eye in eyes]))  # whole or not at all
    assert kept.sum(0).min() == 1
    # A third of the pictures that would lose all keep this one: 0.6 + 0.4 ** 3 / 3; five standard errors.
    expected = 0.6 + 0.4**3 / 3
    assert (kept.mean(1) - expected).abs().max() < 5 * (0.25 / pictures) ** 0.5


def test_what_is_lost_follows_torchs_generator():
    part, specs = fusion(0.5)
    state = torch.get_rng_state()
    first = merged(part.train(), specs, 64)
    second = merged(part.train(), specs, 64)
    torch.set_rng_state(state)
    assert torch.equal(merged(part.train(), specs, 64), first)
    assert not torch.equal(first, second)
    with pytest.raises(RecipeError, match="encoder_dropout"):
        fusion(1.0)
