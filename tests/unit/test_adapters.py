"""Low-rank adapters: where they go, what they compute, how they are kept, and what merging leaves."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from tests import tiny
from vlmix.core.adapters import AdapterSettings
from vlmix.core.errors import PlanError, RecipeError
from vlmix.core.parts import ENCODERS
from vlmix.models.adapters import (
    AdaptedLinear,
    add_adapters,
    bare,
    install_adapters,
    merge_adapters,
    merged_tensors,
)
from vlmix.models.configuration import VlmixConfig
from vlmix.models.loading import no_bars
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import parameter_count, plan_model, shape_only
from vlmix.train.trainable import select, set_modes

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
DECODERS = {
    "llama": {**SIZES, **HEADS, "tie_word_embeddings": True},
    "qwen3": {**SIZES, **HEADS, "head_dim": 8, "tie_word_embeddings": False},
    "gemma2": {**SIZES, **HEADS, "head_dim": 8},
    "mixtral": {**SIZES, **HEADS, "num_local_experts": 2},
}
TWO = [
    {"match": ["encoders.0.*q_proj", "language_model.*"], "rank": 2, "alpha": 8.0},
    {"match": ["language_model.*q_proj"], "rank": 3, "alpha": 3.0, "dropout": 0.4},
]


def config(adapters=None, decoder="llama"):
    return VlmixConfig(
        text_config={"model_type": decoder, **DECODERS[decoder]},
        encoders=[ENCODERS.get(kind).settings_class.tiny().model_dump() for kind in ("siglip", "clip")],
        fusion={"kind": "sequence_append", "width": 8},
        projector={"kind": "linear"},
        image_size=32,
        image_token_id=50,
        adapters=adapters,
    )


def trained(adapters=None, decoder="llama"):
    """A model whose adapters have learnt something."""
    torch.manual_seed(0)
    model = VlmixForConditionalGeneration(config(adapters, decoder)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    images = torch.full((2, 32), 50)  # 16 tokens of each eye
    return {
        "input_ids": torch.cat([images, torch.randint(0, 50, (2, 5))], 1),
        "pixel_values": torch.rand(2, 3, 32, 32),
    }


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


def test_globs_choose_the_linears_and_an_entry_is_an_adapter_of_its_own():
    model = VlmixForConditionalGeneration(config(TWO))
    found = {name.removeprefix("model."): sorted(layer.lora_A) for name, layer in layers(model).items()}
    assert {name for name in found if name.startswith("encoders.")} == {
        f"encoders.0.tower.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }
    words = {name: adapters for name, adapters in found.items() if name.startswith("language_model.")}
    assert len(words) == 2 * 7
    assert all(
        adapters == (["adapter_0", "adapter_1"] if name.endswith("q_proj") else ["adapter_0"])
        for name, adapters in words.items()
    )
    assert type(model.get_output_embeddings()) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
    chosen = select(model, {"*lora_*": 1e-3, "encoders.0.*lora_*": 1e-4, "*lora_?.adapter_1.*": 1e-5})
    assert [row.tensors for row in chosen.rows[:3]] == [2 * 14, 2 * 2, 2 * 2]
    set_modes(model)
    name = "model.language_model.model.layers.0.self_attn.q_proj"
    assert model.get_submodule(name).lora_dropout["adapter_1"].training
    assert not model.get_submodule(name).base_layer.training


def test_an_adapted_linear_computes_the_papers_formula():
    layer = layers(trained(TWO))["model.language_model.model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 16)
    weight = layer.base_layer.weight.detach().double()
    for index, scale in ((0, 8 / 2), (1, 3 / 3)):
        down, up = (
            side[f"adapter_{index}"].weight.detach().double() for side in (layer.lora_A, layer.lora_B)
        )
        weight = weight + scale * up @ down
    # float32 sums of 16 terms of size one, in two steps where the reference takes one.
    assert torch.allclose(layer(x), (x.double() @ weight.T).float(), atol=1e-5)


def test_a_new_adapter_changes_nothing(batch):
    plain, adapted = trained(), trained(TWO)
    fresh = VlmixForConditionalGeneration(config(TWO)).eval()
    with bare(fresh):
        fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(**batch).logits, plain(**batch).logits)
    assert not torch.equal(adapted(**batch).logits, plain(**batch).logits)
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "lora_A" in name:  # uniform within one over the root of the inputs
            bound = parameter.shape[1] ** -0.5
            assert 0.4 * bound < parameter.std() < bound
            assert parameter.abs().max() <= bound


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_saved_model_keeps_its_adapters(tmp_path, batch, decoder):
    model = trained(TWO, decoder)
    with no_bars():
        model.save_pretrained(tmp_path)
        again, info = VlmixForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.adapter_settings() == model.config.adapter_settings()
    assert layers(again).keys() == layers(model).keys()
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    said = [each.generate(**batch, max_new_tokens=4, do_sample=False) for each in (model, again)]
    assert torch.equal(*said)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_merged_model_is_a_plain_one_that_says_the_same(tmp_path, batch, decoder):
    model = trained(TWO, decoder)
    shared = model.config
    expected = model(**batch).logits
    assert merge_adapters(model) == len(layers(trained(TWO, decoder)))
    assert (
        model.state_dict().keys() == VlmixForConditionalGeneration(config(None, decoder)).state_dict().keys()
    )
    # float32: (W + s B A) x against W x + s B (A x), through two layers.
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
    assert model.config.adapters is None
    assert model.model.config.adapters is None
    assert len(shared.adapters) == 2
    with no_bars():
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert merge_adapters(model) == 0


def test_merging_half_precision_rounds_once():
    model = trained(TWO).to(torch.bfloat16)
    tensors = copy.deepcopy(model.state_dict())
    merged = merged_tensors(tensors, model.config.adapter_settings())
    name = "model.language_model.model.layers.0.self_attn.q_proj"
    exact = tensors[f"{name}.base_layer.weight"].float()
    for index, scale in ((0, 4.0), (1, 1.0)):
        down, up = (tensors[f"{name}.lora_{side}.adapter_{index}.weight"].float() for side in "AB")
        exact = exact + scale * (up @ down)
    assert torch.equal(merged[f"{name}.weight"], exact.to(torch.bfloat16))


def test_planning_counts_adapters_without_making_them():
    plain, adapted = shape_only(config()), shape_only(config(TWO))
    assert all(parameter.is_meta for parameter in adapted.parameters())
    more = sum(
        settings.rank * (layer.in_features + layer.out_features)
        for layer in layers(adapted).values()
        for index, settings in enumerate(adapted.config.adapter_settings())
        if f"adapter_{index}" in layer.lora_A
    )
    assert parameter_count(adapted) == parameter_count(plain) + more


def test_planning_knows_what_4_bits_take():
    plain, packed = (
        plan_model(config(adapters)) for adapters in (None, [{"match": ["*"], "quantise": "nf4"}])
    )
    adapted = plan_model(config([{"match": ["*"]}]))
    assert packed.parameters == adapted.parameters > plain.parameters
    assert packed.active == packed.parameters
    # Of two bytes a weight half of one is left, and four for every block of 64; short blocks round up.
    saved = packed.in_4_bits * (2 - 0.5 - 4 / 64)
    assert packed.weight_bytes == pytest.approx(adapted.weight_bytes - saved, rel=1e-2)
    assert packed.activation_bytes <= adapted.activation_bytes


@pytest.mark.parametrize("kind", ENCODERS.names())
def test_every_linear_of_an_encoder_takes_part_through_its_adapter(kind):
    """A part that reads a weight past its Linear would leave the adapter without any effect."""
    torch.manual_seed(0)
    cls = ENCODERS.get(kind)
    model = nn.Module()
    model.encoders = nn.ModuleList([cls(cls.settings_class.tiny())])
    bound = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    install_adapters(model, None, [AdapterSettings(match=["encoders.*"], rank=1)])
    assert layers(model).keys() == bound
    for layer in layers(model).values():
        layer.reset()
    model.encoders[0](torch.rand(2, 3, 64, 64)).tokens.square().sum().backward()
    inert = {name for name, layer in layers(model).items() if layer.lora_B["adapter_0"].weight.grad is None}
    assert not inert


def test_a_router_is_left_alone_for_an_adapter_there_would_never_be_called():
    mixture = {"scope": "instance", "layers": "all", "router": {"kind": "instance"}}
    for kind in ({"kind": "adapter", "width": 4}, {"kind": "lora", "width": 4}, {"residual": True}):
        config = tiny.config()
        config.experts = [{**mixture, **kind}]
        config.adapters = [{"match": ["language_model.*"], "rank": 2}]
        model = VlmixForConditionalGeneration(config)
        ids = torch.tensor([[2, 5, 7, 11]])
        model(input_ids=ids, instruction_ids=ids, labels=ids).loss.backward()
        adapters = {name: weight for name, weight in model.named_parameters() if ".lora_" in name}
        assert any("mlp.dense" in name for name in adapters)
        assert not [name for name, weight in adapters.items() if weight.grad is None]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            [{"match": ["encoders.7.*"]}],
            r"adapters\.0\.match: 'encoders\.7\.\*' matches no Linear.*encoders\.0",
        ),
        ([{"match": ["*"]}, {"match": ["views.*"]}], r"adapters\.1\.match: .*can have an adapter"),
        ([{"match": ["language_model.lm_head"]}], "the head trains whole"),
        ([{"match": ["*"]}, {"match": ["*q_proj"], "dora": True}], "has another adapter already"),
        ([{"match": ["*q_proj"], "dora": True}, {"match": ["*"]}], r"adapters\.1: .*takes one only"),
    ],
)
def test_a_glob_that_matches_no_linear_is_refused(adapters, message):
    with pytest.raises(PlanError, match=message):
        shape_only(config(adapters))


WRONG = [
    {"rank": 0},
    {"match": []},
    {"rang": 3},
    {"dropout": 1.0},
    {"rank_share": 2.0},
    {"quantise": "int8"},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(RecipeError, match=r"adapters\.0\."):
        config([{"match": ["*"], **wrong}]).adapter_settings()


@pytest.mark.parametrize("ranks", [{"rank": 2, "rank_share": 0.5}, {"rank": None}])
def test_a_rank_is_given_in_one_way(ranks):
    with pytest.raises(RecipeError, match="exactly one of `rank` and `rank_share`"):
        config([{"match": ["*"], **ranks}]).adapter_settings()


def test_a_rank_may_be_a_share_of_the_matrix_and_scaled_by_its_root():
    half = AdapterSettings(match=["*"], rank_share=0.5, alpha=6, scaling="rank_stabilised")
    assert AdapterSettings.model_validate(half.model_dump()) == half
    model = trained([half.model_dump()])
    for layer in layers(model).values():
        down, up = (side["adapter_0"].weight for side in (layer.lora_A, layer.lora_B))
        rank = round(min(layer.in_features, layer.out_features) / 2)
        assert down.shape[0] == up.shape[1] == rank
        x = torch.randn(2, layer.in_features)
        added = 6 / rank**0.5 * (x.double() @ down.double().T @ up.double().T)
        # float32 sums of at most 32 terms of size ten.
        assert torch.allclose(layer(x), layer.base_layer(x) + added.float(), atol=1e-4)


VARIANTS = [
    {"dora": True},
    {"quantise": "nf4"},
    {"dora": True, "quantise": "nf4", "dropout": 0.3},
    {"rank_share": 0.5, "scaling": "rank_stabilised"},
]


def variant(more):
    """Adapters of one kind on every part, having learnt something."""
    settings = {"match": ["*"], "rank": 2, "alpha": 2.0, **more}
    if "rank_share" in more:
        del settings["rank"]
    model = trained([settings])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
    return model


@pytest.mark.parametrize("more", VARIANTS)
def test_every_kind_of_adapter_is_kept_trained_and_merged(tmp_path, batch, more):
    model = variant(more)
    assert any(name.startswith("model.projector") for name in layers(model))
    assert any(name.startswith("model.fusion") for name in layers(model))
    expected, tensors = model(**batch).logits, {n: t.clone() for n, t in model.state_dict().items()}
    with no_bars():
        model.save_pretrained(tmp_path)
        again, info = VlmixForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(**batch).logits, expected)
    with bare(model):
        assert model.state_dict().keys() == trained().state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    model.train()(**batch).logits.square().sum().backward()
    trains = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert [name for name, p in trains.items() if p.grad is None] == []
    expected = model.eval()(**batch).logits
    assert merge_adapters(model)
    assert model.state_dict().keys() == trained().state_dict().keys()
    # float32 sums of up to 32 terms in another order, through two encoders and two decoder layers.
    assert torch.allclose(model(**batch).logits, expected, atol=1e-4)


def test_dora_is_the_papers_formula():
    layer = layers(variant({"dora": True}))["model.language_model.model.layers.0.self_attn.q_proj"]
    down, up = (side["adapter_0"].weight.double() for side in (layer.lora_A, layer.lora_B))
    direction = layer.base_layer.weight.double() + 2 / 2 * up @ down
    length = layer.lora_magnitude_vector["adapter_0"].weight.double()
    weight = length[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, 16)
    # float32 sums of 16 terms of size one.
    assert torch.allclose(layer(x), (x.double() @ weight.T).float(), atol=1e-5)


@pytest.mark.parametrize("more", VARIANTS)
def test_adapters_put_on_a_trained_model_change_nothing_but_what_4_bits_round(batch, more):
    plain, adapted = trained(), trained()
    config = adapted.config
    add_adapters(adapted, [AdapterSettings(match=["*"], **more)])
    add_adapters(adapted, [AdapterSettings(match=["projector.*"])] if "dora" not in more else [])
    assert config.adapters is None
    assert len(adapted.config.adapters) == len(adapted.model.config.adapters) == 2 - ("dora" in more)
    assert torch.equal(adapted(**batch).logits, plain(**batch).logits) is ("quantise" not in more)
    other = trained()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with bare(adapted):  # other weights below: the adapters, still new, add nothing to them either
        adapted.load_state_dict(other.state_dict())
    with bare(adapted):
        plain.load_state_dict(adapted.state_dict())
    assert torch.equal(adapted(**batch).logits, plain(**batch).logits)
    if "quantise" not in more:
        assert torch.equal(plain(**batch).logits, other(**batch).logits)
