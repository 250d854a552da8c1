"""Cambrian-1: four encoders in folders of their own, aggregators before the decoder and inside it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from tests.layouts import CHANNELS, WIDTH, WIDTHS, clip, convnext, decoder, language, projector, written
from vlmix.convert._compose import Beside
from vlmix.convert.export import export
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe_file import with_overrides

pytestmark = pytest.mark.flow

NAMES = ["siglip/tiny", "openai/clip", "facebook/dinov2-res16", "clip-convnext-L-multi-stage-res32"]
TOKENS = [4, 4, 4, 16]
INNER, SIDE = 32, 2
CONFIG = {
    "architectures": ["CambrianLlamaForCausalLM"],
    "model_type": "cambrian_llama",
    "mm_projector_type": "sva",
    "mm_vision_tower_aux_list": NAMES,
    "mm_vision_tower_aux_token_len_list": TOKENS,
    "image_token_len": SIDE**2,
    "num_query_group": 1,
    "query_num_list": [SIDE**2],
    "connector_depth": 2,
    "connector_only": False,
    "vision_hidden_size": INNER,
    "num_of_vision_sampler_layers": 2,
    "start_of_vision_sampler_layers": 0,
    "stride_of_vision_sampler_layers": 1,
    "image_position": 3,
    "mm_vision_select_layer": -2,
}
# Shapes do not show heads, and tiny convnexts are not read at 1024 pixels.
CHANGES = ["encoders.1.heads=1"]


def siglip():
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=CHANNELS,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            vision_use_head=False,
        )
    )


def dinov2():
    config = {"hidden_size": CHANNELS, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return Dinov2Model(Dinov2Config(**config, image_size=24, patch_size=4))


def aggregator(query):
    """A layer of theirs, by their names."""
    shapes = {
        "proj_context.weight": (INNER, INNER),
        "proj_in.weight": (INNER, query + INNER),
        "norm.weight": (INNER,),
        "norm.bias": (INNER,),
        "proj_out.linear_1.weight": (INNER, INNER),
        "proj_out.linear_2.weight": (query, INNER),
        "cross_attn.o_proj.weight": (INNER, INNER),
        "pos_embed_3": (4, INNER),
    }
    for which in ("q_proj", *(f"{kind}_proj_{i}" for kind in "kv" for i in range(4))):
        norm = f"cross_attn.{which}.0"
        shapes |= {f"{norm}.weight": (INNER,), f"{norm}.bias": (INNER,)}
        shapes[f"cross_attn.{which}.1.weight"] = (INNER, INNER)
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


@pytest.fixture
def published(tmp_path):
    """The checkpoint, and its encoders beside it under the names it gives."""
    torch.manual_seed(0)
    tensors, flat = language(decoder("llama"), tmp_path / "decoder")
    for i, channels in enumerate([CHANNELS, CHANNELS, CHANNELS, sum(WIDTHS)]):
        reading = nn.Sequential(
            nn.Linear(channels, INNER), nn.GELU(), nn.Linear(INNER, INNER), nn.LayerNorm(INNER)
        )
        tensors |= {f"model.mm_projector_aux_{i}.{key}": value for key, value in reading.state_dict().items()}
    for i in range(2):
        tensors |= {f"model.vision_sampler_0.layers.{i}.{k}": v for k, v in aggregator(INNER).items()}
        inside = f"model.vision_sampler_layers.{i}.layers.0"
        tensors |= {f"{inside}.{k}": v for k, v in aggregator(WIDTH).items()}
    own = {"model.vision_query": torch.randn(1, INNER), "model.image_newline": torch.randn(WIDTH)}
    for name, tower in zip(NAMES[:3], (siglip(), clip(), dinov2()), strict=True):
        tower.save_pretrained(tmp_path / name)
    (tmp_path / NAMES[3]).mkdir()
    trunk = {f"visual.trunk.{key}": value for key, value in convnext().state_dict().items()}
    save_file(trunk, tmp_path / NAMES[3] / "open_clip_model.safetensors")
    (tmp_path / NAMES[3] / "open_clip_config.json").write_text("{}")
    return written(tmp_path / "cambrian", {**tensors, **projector(INNER), **own}, {**flat, **CONFIG})


def converted(published, target, **options):
    return convert(published, target, change=lambda raw: with_overrides(raw, CHANGES), **options)


@torch.no_grad()
def test_it_is_read_runs_and_goes_back(published, tmp_path):
    done = converted(published, tmp_path / "ours")
    assert done.family == "cambrian"
    model = VlmixForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    inner = model.model
    assert [spec.grid for spec in inner.viewing.plan.offered] == [(2, 2), (2, 2), (2, 2), (4, 4)]
    assert (inner.revisits, inner.viewing.plan.tokens) == ((0, 1), SIDE * (SIDE + 1))
    stored = load_file(published / "model.safetensors")
    assert torch.equal(
        inner.fusion.inside[1].places["3"], stored["model.vision_sampler_layers.1.layers.0.pos_embed_3"]
    )
    assert torch.equal(inner.fusion.inputs[3][0].weight, stored["model.mm_projector_aux_3.0.weight"])
    assert torch.equal(inner.views.newline, stored["model.image_newline"])
    pixels = torch.rand(1, 3, 32, 32)
    ids = torch.tensor([[2, *[model.config.image_token_id] * 6, 9]])
    tilings = torch.tensor([[1, 1, 20, 20]])
    out = model(input_ids=ids, pixel_values=pixels, image_tilings=tilings)
    inner.revisits = ()
    assert not torch.allclose(
        out.logits, model(input_ids=ids, pixel_values=pixels, image_tilings=tilings).logits
    )
    export(tmp_path / "ours", tmp_path / "back", "cambrian")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert stored.keys() == back.keys()
    assert all(torch.equal(stored[name], back[name]) for name in stored)


def test_stages_of_a_convnext_go_straight_to_the_grid_they_are_read_on(published, tmp_path):
    converted(published, tmp_path / "ours")
    encoder = VlmixForConditionalGeneration.from_pretrained(tmp_path / "ours").eval().model.encoders[3]
    tower, pixels = encoder.tower, torch.rand(1, 3, 32, 32)
    x, maps = encoder.embed(pixels), []
    for stage in tower.stages:
        x = stage(x)
        maps.append(nn.functional.interpolate(x, size=(4, 4), mode="bilinear"))
    assert torch.equal(encoder(pixels).to_nchw(), torch.cat(maps, dim=1))


def test_what_has_no_counterpart_is_named(published, tmp_path):
    (tmp_path / "siglip").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="--tower siglip/tiny=DIR"):
        converted(published, tmp_path / "ours")
    named = Beside(towers={"siglip/tiny": tmp_path / "elsewhere" / "tiny"})
    converted(published, tmp_path / "ours", beside=named)
    model = VlmixForConditionalGeneration.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="hold no encoders"):
        export(tmp_path / "trained", tmp_path / "back", "cambrian")
    tensors = load_file(published / "model.safetensors")
    tensors["model.vision_tower_aux_list.0.vision_tower.norm.weight"] = torch.ones(3)
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(CheckpointError, match="trained along"):
        converted(published, tmp_path / "other", beside=named)
