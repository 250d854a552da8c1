"""Encoders run by themselves: the same loss and gradients, and one answer for a picture in any company."""

import pytest
import torch

from tests.tiny import PLACEHOLDER, part, text_config
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS
from vlmix.core.tensors import FeatureMap
from vlmix.core.views import Tiling
from vlmix.models import looking
from vlmix.models.configuration import VlmixConfig
from vlmix.models.features import SeenPictures
from vlmix.models.looking import at_once, layout, look, obstacle, questions
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.viewing import tilings_tensor
from vlmix.train.trainable import set_modes

VIEWS = {
    "whole": None,
    "hd": {"kind": "hd", "grid": 2, "tile_size": 32},
    "anyres": {"kind": "anyres", "canvases": [[1, 2], [2, 1]]},
}


def network(fusion, views="whole", sees="views"):
    torch.manual_seed(0)
    encoders = [part(ENCODERS, "clip"), part(ENCODERS, "convnext")]
    encoders[1] |= {"sees": sees, "stages": [0, 1]}
    built = VlmixForConditionalGeneration(
        VlmixConfig(
            text_config=text_config(),
            encoders=encoders,
            fusion={**part(FUSIONS, fusion), **({"width": 8} if fusion == "sequence_append" else {})},
            views=VIEWS[views],
            projector=part(PROJECTORS, "mlp"),
            image_size=32,
            image_token_id=PLACEHOLDER,
        )
    ).float()
    built.model.encoders.requires_grad_(False)
    set_modes(built)
    return built


def batch(built, pictures=3):
    """One row with some pictures: views that vary are cut differently from picture to picture."""
    torch.manual_seed(1)
    viewing, tilings = built.model.viewing, None
    rows = pictures
    if viewing.plan.varies:
        cut = [Tiling(1, 2, 30, 60) if n % 2 else Tiling(2, 1, 60, 30) for n in range(pictures)]
        tilings, rows = tilings_tensor(cut), sum(viewing.counts(cut))
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
    tokens = sum(viewing.tokens(viewing.tilings(pixels, tilings)))
    ids = torch.tensor([[PLACEHOLDER] * tokens + [5, 6, 7, 8]])
    labels = ids.masked_fill(ids == PLACEHOLDER, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_tilings": tilings}


def trained(built, inputs):
    built.zero_grad()
    torch.manual_seed(2)
    loss = built(**inputs, instruction_ids=torch.tensor([[5, 6]])).loss
    loss.backward()
    return loss, {name: p.grad for name, p in built.named_parameters() if p.grad is not None}


CASES = [
    *((fusion, "whole", "views") for fusion in FUSIONS.names() if fusion != "mixture_of_resolution"),
    ("channel_concat", "hd", "views"),
    ("patch_mining", "hd", "picture"),
    ("channel_concat", "anyres", "views"),
    ("deformable", "anyres", "views"),
]


@pytest.mark.parametrize(("fusion", "views", "sees"), CASES)
def test_loss_and_gradients_are_those_with_the_encoders_inside(monkeypatch, fusion, views, sees):
    built = network(fusion, views, sees)
    inputs = batch(built)
    assert obstacle(built.model) == ""
    # All views at once, as the model runs them: kernels sum in another order in batches of another size.
    monkeypatch.setattr(looking, "at_once", lambda *on: len(inputs["pixel_values"]) * 16)
    monkeypatch.setattr(looking, "_filled", lambda some, count: some)
    asked = questions(built.model)
    seen = look(built.model, asked, inputs["pixel_values"], None).laid_out(layout(built.model, asked))
    loss, gradients = trained(built, inputs)
    for encoder in built.model.encoders:
        monkeypatch.setattr(encoder, "forward", None)
    again, same = trained(built, {**inputs, "pixel_values": seen})
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("count", [1, 4, 8])
def test_what_is_said_of_a_picture_depends_on_no_other(monkeypatch, count):
    built = network("patch_mining")
    monkeypatch.setattr(looking, "at_once", lambda *on: count)
    asked = questions(built.model)
    assert asked == ("map", "levels")
    pixels = batch(built, pictures=9)["pixel_values"]
    together = look(built.model, asked, pixels, None)
    parts = together.split([[1] * 9] * 2)
    for number, maps in enumerate(parts):
        alone = look(built.model, asked, pixels[number : number + 1], None)
        for ours, theirs in zip(maps, alone.maps, strict=True):
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(ours, theirs, strict=True))
    joined = SeenPictures.joined(parts, 9).to("cpu")
    assert joined.isfinite().all()
    assert all(
        torch.equal(a.tokens, b.tokens)
        for ours, theirs in zip(joined.maps, together.maps, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_small_encoders_are_shown_some_views_at_once():
    """Time goes into calling kernels there; larger ones gain nothing from company, and fillers would cost."""
    cpu = torch.device("cpu")
    small, large = torch.nn.Linear(8, 8), torch.nn.Linear(4096, 4096, device="meta")
    assert [at_once(cpu, each) for each in (small, large)] == [4, 1]
    assert [at_once(torch.device("cuda"), each) for each in (small, large)] == [8, 8]


def test_encoders_that_must_run_in_every_step_are_known_and_named():
    built = network("channel_concat")
    state = torch.get_rng_state()
    assert obstacle(built.model) == ""
    assert torch.equal(state, torch.get_rng_state())
    built.model.encoders[1].requires_grad_(True)
    assert obstacle(built.model) == "encoder 1 is trained"
    assert obstacle(network("single").model) == ""
    assert "`mixture_of_resolution` needs more" in obstacle(network("mixture_of_resolution").model)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("views", [1, 3])
def test_numbers_stay_the_same_however_an_encoder_leaves_them_in_memory(order, views):
    """Two views tell the layout of any number, also where views are not behind one another."""
    left = [torch.empty_permuted((count, 4, 6), order) for count in (2, views)]
    tokens = torch.arange(views * 24.0).reshape(views, 4, 6)
    seen = SeenPictures(((FeatureMap(tokens, (2, 2)),),), views).laid_out([[left[0].stride()]])
    assert torch.equal(seen.maps[0][0].tokens, tokens)
    if views > 1:
        assert seen.maps[0][0].tokens.stride() == left[1].stride()


def test_a_gap_behind_each_view_is_kept():
    """A class token that was cut off, say."""
    stride = torch.zeros(2, 17, 6)[:, 1:].stride()
    seen = SeenPictures(((FeatureMap(torch.rand(3, 16, 6), (4, 4)),),), 3).laid_out([[stride]])
    assert seen.maps[0][0].tokens.stride() == (17 * 6, 6, 1)
