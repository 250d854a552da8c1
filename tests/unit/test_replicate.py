"""One adapter in each layer becomes several: copies, fresh routers, a folder and a resumed run too."""

import pytest
import torch
from torch.testing import assert_close

from tests import tiny
from vlmix.core.errors import RecipeError
from vlmix.core.experts import ExpertSettings
from vlmix.core.tape import instructed
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.moe.install import expert_layers
from vlmix.train.transforms.replicate import Replicate, ReplicateSettings
from vlmix.train.upcycling import reshape_model, upcycle_model

IDS = {"input_ids": torch.arange(4, 20).view(2, 8), "instruction_ids": torch.arange(4, 10).view(2, 3)}


def settings(gradient="straight_through", **changes):
    router = {"kind": "instance", "k": 1, "gradient": gradient}
    return ExpertSettings(
        **{
            "kind": "adapter",
            "scope": "instance",
            "layers": "all",
            "count": 1,
            "width": 4,
            "router": router,
            **changes,
        }
    )


def trained(mixture):
    torch.manual_seed(0)
    model = tiny.model()
    upcycle_model(model, mixture)
    with torch.no_grad():
        for layer in expert_layers(model):
            for parameter in (*layer.experts.parameters(), *layer.router.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if layer.strength is not None:
                layer.strength.fill_(0.7)
    return model.eval()


def test_an_adapter_stands_beside_the_network_and_is_scaled():
    """y = FFN(x) + s * up(relu(down(x))), whichever row's instruction is read (one expert: no choice)."""
    layer = expert_layers(trained(settings("switch")))[0]
    x_BTD = torch.randn(2, 5, 32)
    with instructed(torch.randn(2, 32)), torch.no_grad():
        found = layer(x_BTD)
        inner = torch.relu(x_BTD @ layer.experts.up_proj[0].T)
        assert_close(found, layer.dense(x_BTD) + 0.7 * inner @ layer.experts.down_proj[0].T)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_the_copies_answer_as_the_one_did_and_come_back_from_a_folder(kind, tmp_path):
    model = trained(settings(kind=kind))
    before = model(**IDS).logits
    said = Replicate(ReplicateSettings(count=3)).apply(model)
    assert said.startswith("experts: 2 layers with 3 copies")
    # One choice at full weight: copies in place of the one change nothing but the order of sums.
    assert_close(model(**IDS).logits, before)
    assert [layer.router_experts for layer in expert_layers(model)] == [3, 3]
    first, second = (layer.router.gate.weight for layer in expert_layers(model))
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    again = VlmixForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**IDS).logits, model(**IDS).logits)
    resumed = tiny.model()
    reshape_model(resumed, settings(kind=kind))
    Replicate(ReplicateSettings(count=3)).reshape(resumed)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(**IDS).logits, model(**IDS).logits)
    assert resumed.config.experts == model.config.experts


def test_switch_scaling_gives_the_fresh_routers_a_gradient():
    model = trained(settings("switch"))
    Replicate(ReplicateSettings()).apply(model)
    model(**IDS).logits.square().sum().backward()
    assert all(layer.router.gate.weight.grad.any() for layer in expert_layers(model))


@pytest.mark.parametrize(
    ("mixture", "which", "words"),
    [
        (settings(), 1, "there is no mixture 1"),
        (settings(count=2), 0, "has 2 experts of kind adapter"),
        (ExpertSettings(), 0, "a dense network: `upcycle`"),
    ],
)
def test_what_is_no_single_adapter_is_refused(mixture, which, words):
    with pytest.raises(RecipeError, match=words):
        Replicate(ReplicateSettings(mixture=which)).apply(trained(mixture))
