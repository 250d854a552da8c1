"""The mixture of vision experts: what its weights come from, where points look, and what the tape says."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from vlmix.core.errors import PlanError
from vlmix.core.tape import recording
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec
from vlmix.fusion._adaptive import pooled
from vlmix.fusion.mixture_of_vision_experts import MixtureOfVisionExperts, MixtureOfVisionExpertsSettings

# A square, a rectangle that no square divides, and a strip.
SPECS = [VisionSpec((4, 4), 8), VisionSpec((3, 7), 4), VisionSpec((1, 5), 6)]
WIDTH, ASKED, IMAGES = 10, 5, 3


def built(align="adaptive_deformable", **changes):
    torch.manual_seed(0)
    sizes = {"grid": (2, 3), "width": WIDTH, "instruction": ASKED, "depth": 2, "heads": 2, "points": 2}
    part = MixtureOfVisionExperts(MixtureOfVisionExpertsSettings(align=align, **{**sizes, **changes}), SPECS)
    with torch.no_grad():
        part.reset()
    return part


def maps():
    return [FeatureMap(torch.randn(IMAGES, s.tokens, s.channels, requires_grad=True), s.grid) for s in SPECS]


def context(tokens=1):
    return TextContext(torch.randn(IMAGES, tokens, ASKED), torch.ones(IMAGES, tokens, dtype=torch.bool))


def weighed(part, shown, asked):
    with recording() as tape:
        out = part.merge(shown, asked)
    (routing,) = tape
    order = routing.indices.argsort(1)
    return out.tokens, routing.weights.gather(1, order), routing.norms.gather(1, order)


@pytest.mark.parametrize("align", ["adaptive_deformable", "average"])
def test_weights_come_from_the_instruction_alone_and_norms_from_both(align):
    part, asked = built(align), context()
    _, first, norms = weighed(part, maps(), asked)
    _, again, others = weighed(part, maps(), asked)
    _, elsewhere, _ = weighed(part, maps(), context())
    assert torch.equal(first, again)
    assert not torch.allclose(norms, others)
    assert not torch.allclose(first, elsewhere)
    assert_close(first.sum(1), torch.ones(IMAGES))
    shown = maps()
    out, shares, norms = weighed(part, shown, asked)
    aligned = [module(one) for module, one in zip(part.aligned, shown, strict=True)]
    assert_close(out, sum(g[:, None, None] * x for g, x in zip(shares.T, aligned, strict=True)))
    assert_close(
        norms, torch.stack([g * x.flatten(1).norm(dim=1) for g, x in zip(shares.T, aligned, strict=True)], 1)
    )


def test_addition_is_the_router_at_even_weights_times_the_number_of_encoders():
    part, shown = built(), maps()
    with torch.no_grad():
        part.router.gate.weight.zero_()
    routed = part.merge(shown, context()).tokens
    state = {name: value for name, value in part.state_dict().items() if not name.startswith("router.")}
    for weights, factor in (("add", len(SPECS)), ("mean", 1)):
        plain = built(weights=weights)
        plain.load_state_dict(state)
        assert_close(plain.merge(shown).tokens, routed * factor)


def test_gradients_reach_every_encoder_and_where_its_points_look():
    part, shown = built(), maps()
    part.merge(shown, context()).tokens.square().sum().backward()
    assert all(one.tokens.grad.flatten(1).any(1).all() for one in shown)
    assert all(alignment.references.grad.any() for alignment in part.aligned)


def test_one_choice_leaves_the_other_encoders_out():
    part, shown = built(router={"kind": "instance", "k": 1}), maps()
    _, shares, norms = weighed(part, shown, context())
    assert shares.shape == norms.shape == (IMAGES, 1)


def test_queries_are_means_of_cells_and_start_at_their_centres():
    part = built()
    x = torch.arange(12.0).view(1, 12, 1)
    assert pooled(FeatureMap(x, (2, 6)), (1, 3)).flatten().tolist() == [3.5, 5.5, 7.5]
    assert_close(part.aligned[1].references[:3, 0].detach(), torch.tensor([1 / 6, 0.5, 5 / 6]))
    assert_close(part.aligned[1].references[:, 1].detach().unique(), torch.tensor([0.25, 0.75]))


def test_what_cannot_be_mixed_is_refused():
    tiny = MixtureOfVisionExpertsSettings.tiny()
    for specs, changes, words in [
        (SPECS[:1], {}, "needs a second encoder"),
        ([*SPECS, VisionSpec((2, 2), 7)], {}, "2 heads do not share 7 channels"),
        (SPECS, {"router": {"kind": "topk"}}, "does not read the instruction"),
        (SPECS, {"router": {"kind": "instance", "k": 4}}, "4 experts cannot be chosen from 3"),
    ]:
        with pytest.raises(PlanError, match=words):
            MixtureOfVisionExperts.plan(tiny.changed(**changes), specs)
    odd = tiny.changed(align="average", weights="add")
    assert MixtureOfVisionExperts.plan(odd, [*SPECS, VisionSpec((2, 2), 7)]).grid == (2, 2)
    with pytest.raises(PlanError, match="this forward pass has none"):
        built().merge(maps())
    with pytest.raises(PlanError, match="3 instructions for 2 images"):
        built().merge([FeatureMap(one.tokens[:2], one.grid) for one in maps()], context())
