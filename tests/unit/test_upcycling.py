"""A dense model becomes a mixture: what it says, what it keeps, and what a folder of it holds."""

import pytest
import torch

from tests import tiny
from vlmix.core.errors import PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.models.mixtures import active_parameters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import parameter_count
from vlmix.moe.install import chosen_layers, expert_layers
from vlmix.train.upcycling import reshape_model, upcycle_model

NOTHING = 1e-6  # what float32 makes of sums in another order


@pytest.mark.parametrize("model_type", sorted(tiny.DECODERS))
def test_every_decoder_answers_as_before(model_type):
    model = tiny.model(model_type)
    report = upcycle_model(model, ExpertSettings(layers="all"))
    assert report.change < NOTHING
    assert len(report.layers) == 2
    assert "no gradient" in str(report)


@pytest.mark.parametrize("place", ["encoders.0", "projector"])
def test_encoders_and_projectors_too(place):
    config = tiny.config()
    config.projector = {"kind": "mlp", "depth": 2}
    model = VlmixForConditionalGeneration(config).eval()
    report = upcycle_model(model, ExpertSettings(place=place, layers="all", count=3))
    assert report.change < NOTHING
    assert model.config.experts[0]["place"] == place


@pytest.mark.parametrize(
    "changes",
    [{"noise": 0.05}, {"redraw": 0.3}, {"router": {"kind": "topk", "renormalise": False}}],
    ids=["noise", "redraw", "not renormalised"],
)
def test_experts_set_apart_give_the_router_a_gradient(changes):
    torch.manual_seed(0)
    report = upcycle_model(tiny.model(), ExpertSettings(**changes))
    assert report.router_gradient > 10 * NOTHING
    assert "no gradient" not in str(report)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "adapter", "width": 4},
        {"kind": "lora", "width": 4},
        {"shared": 2},
        {"residual": True},
        {"width": 16, "shared": 1},
    ],
    ids=["adapter", "lora", "shared", "residual", "small experts"],
)
def test_what_stands_beside_the_network_starts_without_effect(changes):
    assert upcycle_model(tiny.model(), ExpertSettings(**changes)).change < NOTHING


def test_a_folder_brings_the_mixture_back(tmp_path):
    model = tiny.model()
    upcycle_model(model, ExpertSettings(noise=0.1, count=3))
    upcycle_model(model, ExpertSettings(place="encoders.0", kind="lora", width=4))
    model.save_pretrained(tmp_path)
    again = VlmixForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.arange(4, 20).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert [layer.name for layer in expert_layers(again)] == [layer.name for layer in expert_layers(model)]
    shapes = tiny.model()
    for settings in model.config.expert_settings():
        reshape_model(shapes, settings)
    shapes.load_state_dict(model.state_dict())


def test_active_parameters_are_those_of_the_dense_model_and_the_routers():
    model = tiny.model()
    dense = parameter_count(model)
    upcycle_model(model, ExpertSettings(count=8, router={"kind": "topk", "k": 1}))
    routers = sum(parameter_count(layer.router) for layer in expert_layers(model))
    assert active_parameters(model) == dense + routers


def test_a_list_of_counts_goes_with_the_list_of_layers_in_any_order():
    model = tiny.model()
    upcycle_model(model, ExpertSettings(layers=(1, 0), count=(2, 3)))
    assert [layer.router_experts for layer in expert_layers(model)] == [3, 2]


def test_adapters_inside_the_networks_are_refused_and_others_stay():
    for match, refused in [("language_model.*self_attn*", False), ("language_model.*layers.0.*", True)]:
        config = tiny.config()
        config.adapters = [{"match": [match], "rank": 2}]
        model = VlmixForConditionalGeneration(config).eval()
        for change in (upcycle_model, reshape_model):
            if refused:
                with pytest.raises(PlanError, match="adapters are in"):
                    change(model, ExpertSettings())
        if not refused:
            assert upcycle_model(model, ExpertSettings()).change < NOTHING


def test_places_and_what_is_refused():
    def chosen(layers):
        return chosen_layers(ExpertSettings(layers=layers), 5)

    assert chosen("interval") == [0, 2, 4]
    assert chosen("first_half") == [0, 1]
    assert chosen("second_half") == [2, 3, 4]
    assert chosen([3, 1]) == [3, 1]
    for layers, settings, word in [
        ([5], {}, "there are 2"),
        ("all", {"count": [2, 3, 4]}, "3 numbers for 2 layers"),
        ("all", {"router": {"kind": "topk", "k": 5}}, "5 experts cannot be chosen from 4"),
        ("all", {"router": {"kind": "expert_choice"}}, "before it is written"),
        ("all", {"scope": "instance"}, "the answer included"),
        ("all", {"place": "fusion"}, "nothing that experts could replace"),
        ("all", {"place": "encoders.7"}, "no encoders.7"),
    ]:
        with pytest.raises(PlanError, match=word):
            upcycle_model(tiny.model(), ExpertSettings(layers=layers, **settings))
