"""MoE-LLaVA's folders of every stage, decoder and tower beside transformers' own decoder, and back again.

Experts that are copies answer as the dense network: weights of two that are kept sum to one.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.layouts import CHANNELS, SIDE, SIZES, clip_tensors, language, projector, written
from vlmix.convert._compose import Beside
from vlmix.convert.export import export
from vlmix.convert.families.moe_llava import MoeLlava
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError
from vlmix.core.experts import ExpertSettings
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.moe.install import expert_layers
from vlmix.train.recipe_file import with_overrides
from vlmix.train.upcycling import upcycle_model

pytestmark = pytest.mark.flow
TOLERANCE = 1e-5  # the same float32 arithmetic in another order
IDS = torch.tensor([[2, 5, 7, 11, 13], [2, 9, 8, 33, 4]])
TYPES = {
    "Stablelm": "stablelm",
    "Phi": "phi",
    "Mistral": "mistral",
    "Llama": "llama",
    "Qwen1_5": "qwen2",
    "QWen": "qwen2",
}
QWEN_NETWORK = {"gate_proj": "w2", "up_proj": "w1", "down_proj": "c_proj"}
FLAT = {
    "image_projector_type": "mlp2x_gelu",
    "mm_hidden_size": CHANNELS,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_image_tower": "openai/clip",
    "mm_video_tower": None,
    "video_projector_type": "linear",
    "video_global_proj": False,
    "image_aspect_ratio": "pad",
    "lora": {},
}
MOE = {
    "moe_enable": True,
    "moe_mode": "second_half",
    "moe_layers_idx": [1],
    "ep_size": 1,
    "top_k_experts": 2,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 3.0,
    "min_capacity": 4,
    "router_aux_loss_coef": 0.02,
    "train_modules": ["wg"],
    "num_experts": [3],
}
# Qwen's attention has as many keys as queries, so all decoders here do.
HEADS = {"num_key_value_heads": 4}


def decoder(called):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[TYPES[called]](**{**SIZES, **HEADS})).eval()


def published(called, folder, scratch, *, sparse=True, residual=False, apart=0.0, tower=None):
    """As the authors' classes write it."""
    tensors, config = language(decoder(called), scratch / f"decoder-{called}")
    tensors |= {
        name.replace("mm_projector.", "mm_projector.image_spatial_proj."): value
        for name, value in projector().items()
    }
    tensors |= clip_tensors("model.image_tower.image_tower.vision_model.") if tower is None else tower
    if sparse:
        tensors = with_experts(tensors, residual, apart)
    first = "MoELLaVA" if sparse else "Llava"
    config |= {
        **FLAT,
        "architectures": [f"{first}{called}ForCausalLM"],
        "model_type": f"{first.lower().replace('moe', 'moe_')}_{called.lower()}",
        **({"moe": {**MOE, "use_residual": residual}} if sparse else {}),
    }
    return written(folder, *IN_OWN_WORDS.get(called, lambda *same: same)(tensors, config))


def with_experts(tensors, residual, apart):
    """The network of layer 1 as three experts, ``apart`` from one another or copies."""
    noise, mlp, found = torch.Generator().manual_seed(5), "model.layers.1.mlp.", {}
    for name, value in tensors.items():
        own = name.removeprefix(mlp)
        if own == name:
            found[name] = value
            continue
        for expert in range(3):
            drawn = torch.randn(value.shape, generator=noise)
            experts = f"{mlp}deepspeed_moe.experts.deepspeed_experts.{expert}."
            found[f"{experts}{own}"] = value + apart * drawn
        if residual:
            found[f"{mlp}mlp.{own}"] = value
    found[f"{mlp}deepspeed_moe.gate.wg.weight"] = torch.randn(3, 32, generator=noise)
    if residual:
        found[f"{mlp}coefficient.weight"] = torch.randn(2, 32, generator=noise)
        found[f"{mlp}coefficient.bias"] = torch.randn(2, generator=noise)
    return found


def as_stablelm(tensors, config):
    """With the words of the class that StableLM came with."""
    del config["rope_scaling"]
    words = {"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_pct"}
    return tensors, {words.get(key, key): value for key, value in config.items()}


def as_first_qwen(tensors, config):
    """Under the first Qwen's names: attention in one matrix, and ``w2`` for the gate."""
    found, packed = {}, {}
    words = {
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "model.": "transformer.",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "input_layernorm": "ln_1",
        "embed_tokens": "wte",
        **{f"{ours}.": f"{theirs}." for ours, theirs in QWEN_NETWORK.items()},
    }
    for name, value in tensors.items():
        if "image_tower" in name:
            found[name.replace("model.", "transformer.", 1)] = value
            continue
        new = name
        for ours, theirs in words.items():
            new = new.replace(ours, theirs)
        if "self_attn." in new:
            layer, _, rest = new.partition("self_attn.")
            packed.setdefault(f"{layer}attn.c_attn.{rest.split('.')[-1]}", {})[rest[0]] = value
        else:
            found[new] = value
    found |= {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in packed.items()}
    words = {"rms_norm_eps": "layer_norm_epsilon", "rope_theta": "rotary_emb_base"}
    config = {words.get(key, key): value for key, value in config.items()}
    own = {"kv_channels": 8, "seq_length": 64, "rotary_pct": 1.0, "no_bias": True, "intermediate_size": 96}
    return found, {**config, **own}


IN_OWN_WORDS = {"Stablelm": as_stablelm, "QWen": as_first_qwen}


def loaded(folder):
    return VlmixForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


def same_files(one, other):
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


@torch.no_grad()
@pytest.mark.parametrize("called", TYPES)
@pytest.mark.parametrize("form", ["dense", "experts", "residual"])
def test_any_decoder_reads_text_as_transformers_does(called, form, tmp_path):
    folder = published(
        called, tmp_path / "hub", tmp_path, sparse=form != "dense", residual=form == "residual"
    )
    assert convert(folder, tmp_path / "ours").family == "moe_llava"
    model = loaded(tmp_path / "ours")
    expected = decoder(called)(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=TOLERANCE, rtol=0)
    model.save_pretrained(tmp_path / "trained")  # nothing is known about where it came from
    export(tmp_path / "trained", tmp_path / "written", "moe_llava")
    again = convert(
        tmp_path / "written",
        tmp_path / "again",
        change=lambda raw: with_overrides(raw, ["encoders.0.feature_layer=-1"]),  # CLIP's last block is gone
    )
    assert again.family == "moe_llava"
    assert torch.equal(loaded(tmp_path / "again")(input_ids=IDS).logits, model(input_ids=IDS).logits)
    flat = json.loads((tmp_path / "written/config.json").read_text())
    if form != "dense":
        kept = {
            "train_modules": [],
            "router_aux_loss_coef": pytest.approx(0.02),
            "use_residual": form == "residual",
        }
        assert flat["moe"] == {**MOE, **kept}


@pytest.mark.parametrize("called", TYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_the_way_back_gives_the_same_folder(called, residual, tmp_path):
    folder = published(called, tmp_path / "hub", tmp_path, residual=residual, apart=1.0)
    convert(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "moe_llava")
    same_files(folder, tmp_path / "back")


def siglip():
    torch.manual_seed(1)
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=CHANNELS,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=SIDE,
            patch_size=8,
        )
    ).eval()


@torch.no_grad()
def test_siglip_loses_its_first_patch_as_the_authors_code_has_it(tmp_path):
    prefix, tower = "model.image_tower.image_tower.vision_model.", siglip()
    tensors = {f"{prefix}{name}": value.clone() for name, value in tower.state_dict().items()}
    folder = published("Phi", tmp_path / "hub", tmp_path, tower=tensors)
    convert(folder, tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    states = tower((pixels - 0.5) / 0.5, output_hidden_states=True).hidden_states
    seen = model.model.encoders[0](pixels)
    assert model.model.image_seq_length == 3
    torch.testing.assert_close(seen.tokens, states[-2][:, 1:], atol=TOLERANCE, rtol=0)
    export(tmp_path / "ours", tmp_path / "back", "moe_llava")
    same_files(folder, tmp_path / "back")
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", "moe_llava")
    convert(
        tmp_path / "written",
        tmp_path / "again",
        change=lambda raw: with_overrides(raw, ["encoders.0.feature_layer=-1"]),
    )
    assert torch.equal(loaded(tmp_path / "again").model.encoders[0](pixels).tokens, seen.tokens)


@torch.no_grad()
@pytest.mark.parametrize("called", ["Stablelm", "QWen"])
def test_the_first_stage_and_its_decoder(called, tmp_path):
    whole = load_file(published(called, tmp_path / "whole", tmp_path, sparse=False) / "model.safetensors")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    tower = {name: value for name, value in whole.items() if "image_tower" in name or "mm_projector" in name}
    words = [name for name in whole if name not in tower]
    written(
        tmp_path / "decoder", {name: whole[name] for name in words}, {**config, "model_type": OWN[called]}
    )
    written(tmp_path / "stage", tower, config, "mm_projector.bin")
    beside = Beside(language_model=tmp_path / "decoder")
    assert convert(tmp_path / "stage", tmp_path / "ours", beside=beside).family == "moe_llava"
    expected = decoder(called)(input_ids=IDS).logits
    torch.testing.assert_close(
        loaded(tmp_path / "ours")(input_ids=IDS).logits, expected, atol=TOLERANCE, rtol=0
    )
    export(tmp_path / "ours", tmp_path / "back", "moe_llava")
    assert len(load_file(tmp_path / "back/model.safetensors")) >= len(whole)


OWN = {"Stablelm": "stablelm_epoch", "QWen": "qwen"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MoELLaVAMiniCPMForCausalLM"]}, "MiniCPM"),
        (
            {"architectures": ["MoELLaVAFalconForCausalLM"], "model_type": "moe_llava_falcon"},
            "no decoder known",
        ),
        ({"mm_video_tower": "LanguageBind/Video"}, "films"),
        ({"moe": {key: value for key, value in MOE.items() if key != "min_capacity"}}, "min_capacity"),
        ({"image_projector_type": "qformer2_8"}, "qformer2_8"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(change, said, tmp_path):
    folder = published("Llama", tmp_path / "hub", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=said):
        convert(folder, tmp_path / "ours")


def test_a_qwen_that_turns_a_part_of_its_channels_is_refused(tmp_path):
    folder = published("QWen", tmp_path / "hub", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rotary_pct": 0.5}))
    with pytest.raises(CheckpointError, match="rotary_pct"):
        convert(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("experts.0.router={kind: topk}", "DeepSpeed's gates alone"),
        ("experts.0.router.second=best", "router.second"),
        ("experts.0.balance.z=0.1", "balance.z"),
        ("experts.0.balance.per_modality=true", "balance.per_modality"),
        ("experts.0.balance.bias_rate=0.1", "balance.bias_rate"),
        ("experts.0.scope=instance", "experts.scope"),
        ("experts.0.shared=1", "experts.shared"),
    ],
)
def test_a_mixture_that_deepspeed_cannot_run_is_not_written(change, said, tmp_path):
    folder = published("Llama", tmp_path / "hub", tmp_path)
    convert(folder, tmp_path / "ours")
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    with pytest.raises(CheckpointError, match=said):
        MoeLlava.write(VlmixConfig(**with_overrides(raw, [change])))


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_balance_of_our_own_is_written_as_their_coefficient(layers, tmp_path):
    """Theirs is a sum over layers, ours a mean: 0.06 of two layers is 0.03 of each."""
    convert(published("Llama", tmp_path / "hub", tmp_path, sparse=False), tmp_path / "dense")
    model = loaded(tmp_path / "dense")
    router = {"kind": "deepspeed095", "capacity_factor": 1.25, "min_capacity": 4}
    mixture = {"layers": list(range(layers)), "count": 3, "router": router, "balance": {"switch": 0.06}}
    upcycle_model(model, ExpertSettings.model_validate(mixture))
    for layer in expert_layers(model):
        layer.router.gate.weight.normal_(generator=torch.Generator().manual_seed(7))
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "written", "moe_llava")
    flat = json.loads((tmp_path / "written/config.json").read_text())
    assert flat["moe"]["router_aux_loss_coef"] == pytest.approx(0.06 / layers)
    convert(
        tmp_path / "written",
        tmp_path / "again",
        change=lambda raw: with_overrides(raw, ["encoders.0.feature_layer=-1"]),
    )
    again = loaded(tmp_path / "again")
    (before,), (after,) = (m.config.expert_settings() for m in (loaded(tmp_path / "ours"), again))
    assert after.balance.switch == pytest.approx(before.balance.switch)
    assert (after.layers, after.count) == (before.layers, before.count)
    assert torch.equal(again(input_ids=IDS).logits, loaded(tmp_path / "ours")(input_ids=IDS).logits)
    export(tmp_path / "again", tmp_path / "back", "moe_llava")
    same_files(tmp_path / "written", tmp_path / "back")


def test_a_missing_expert_is_named(tmp_path):
    folder = published("Llama", tmp_path / "hub", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.1.up_proj.weight"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {lost}"):
        convert(folder, tmp_path / "ours")
