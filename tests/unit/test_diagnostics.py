"""Diagnostics against known answers: ranks, likeness, shares of accuracy, windows, gates, and masking."""

import itertools
import math

import pytest
import torch

from tests.tiny import config, part
from vlmix.core.errors import InputError
from vlmix.core.parts import ENCODERS, FUSIONS
from vlmix.core.sample import Score
from vlmix.core.tape import recording
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.evals.diagnostics._gates import reader_of
from vlmix.evals.diagnostics._looks import Seen, _common_grid
from vlmix.evals.diagnostics._shares import utilisation
from vlmix.evals.diagnostics._standing_in import changed, masked, whole_map
from vlmix.evals.diagnostics._subject import Answering, Questions, Subject
from vlmix.evals.diagnostics.feature_maps import effective_rank
from vlmix.evals.diagnostics.mining_windows import evenness, laid_out, window_weights
from vlmix.evals.diagnostics.similarity import cka, gram, hsic, similarities
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size):
    return torch.linalg.qr(noise(size, size, seed=9))[0]


def test_effective_rank_counts_directions():
    assert effective_rank(noise(30, 1) @ noise(1, 8, seed=1)) == pytest.approx(1, abs=1e-9)
    assert effective_rank(rotation(12)) == pytest.approx(12)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert effective_rank(torch.zeros(5, 3)) == 0
    x = noise(40, 6) * torch.arange(1, 7)
    assert effective_rank(7 * x @ rotation(6)) == pytest.approx(effective_rank(x))


def by_definition(k, other):
    """The unbiased estimate as a sum over distinct tokens: no formula of matrices."""
    pairs = list(itertools.permutations(range(len(k)), 2))
    triples = list(itertools.permutations(range(len(k)), 3))
    fours = list(itertools.permutations(range(len(k)), 4))
    both = sum(k[i, j] * other[i, j] for i, j in pairs) / len(pairs)
    apart = sum(k[i, j] * other[q, r] for i, j, q, r in fours) / len(fours)
    chained = sum(k[i, j] * other[i, q] for i, j, q in triples) / len(triples)
    return float(both + apart - 2 * chained)


def test_cka_is_its_definition_and_knows_no_rotation_scale_or_offset():
    x, y = noise(7, 3), noise(7, 5, seed=1)
    assert hsic(gram(x), gram(y)) == pytest.approx(by_definition(gram(x), gram(y)))
    x = noise(200, 6) * torch.arange(1, 7)
    y = x @ noise(6, 4, seed=2) + 0.5 * noise(200, 4, seed=3)
    found = cka(x, y)
    assert found is not None
    assert 0.3 < found < 1
    assert cka(x @ rotation(6) * 5 + 3, y - 8) == pytest.approx(found)
    assert cka(x, x) == pytest.approx(1)
    # Unrelated maps with more channels than tokens: the biased estimate would be near 1.
    assert abs(cka(noise(100, 300, seed=4), noise(100, 400, seed=5)) or 0) < 0.05
    assert cka(torch.ones(9, 3), x[:9]) is None
    assert cka(x[:3], y[:3]) is None
    table = similarities([x, None, y])
    assert table[0][1] is table[1][1] is None
    assert table[0][2] == pytest.approx(found)


def answered(values, task="", group=""):
    return [Score(f"q{i}", float(v), "", task, group and f"{group}{i // 2}") for i, v in enumerate(values)]


@pytest.mark.parametrize("group", ["", "g"])
def test_utilisation_is_the_share_of_accuracy_that_is_lost(group):
    whole = [1] * 60 + [0] * 40
    half = [1] * 30 + [0] * 70
    better = [1] * 66 + [0] * 34
    tables = [answered(values, group=group) for values in (whole, whole, half, better)]
    found = utilisation(tables[0], tables[1:], seed=0)
    dead, needed, harmful = found.rates
    assert [rate.value for rate in (dead, needed, harmful)] == pytest.approx([0, 0.5, -0.1])
    assert dead.low < 0 < dead.high  # a hundred questions without a change do not prove that there is none
    assert 0.3 < needed.low < 0.5 < needed.high < 0.7
    assert harmful.low < -0.1 < harmful.high <= 0
    assert found.gap.value == pytest.approx(0.6)
    assert found.gap.low < 0.6 < found.gap.high
    assert utilisation(tables[0][::-1], [t[::-1] for t in tables[1:]], seed=0) == found
    nothing = answered([0] * 10)
    assert utilisation(nothing, [nothing], seed=0).rates == [None]


def model_with(fusion, eyes=("clip", "convnext")):
    torch.manual_seed(0)
    raw = config(fusion=fusion).to_dict()
    made = VlmixConfig(**{**raw, "encoders": [part(ENCODERS, eye) for eye in eyes]})
    model = VlmixForConditionalGeneration(made).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def fused(model, pixels):
    ids = torch.tensor([[5, 7]])
    return model.get_image_features(pixels, instruction_ids=ids).last_hidden_state


@pytest.mark.parametrize("kind", FUSIONS.names())
@torch.no_grad()
def test_masked_encoders_tell_nothing_of_the_picture_and_leave_no_trace(kind):
    model = model_with(part(FUSIONS, kind))
    one, other = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = fused(model, one)
    with masked(model.model, {0, 1}):
        torch.testing.assert_close(fused(model, one), fused(model, other), atol=0, rtol=0)
    with masked(model.model, {0}):
        assert not torch.equal(fused(model, one), before)
    assert torch.equal(fused(model, one), before)


@torch.no_grad()
def test_channels_of_a_masked_encoder_are_zero_behind_its_norm():
    model = model_with({"kind": "channel_concat", "norm": True}, ("clip", "convnext", "dinov2"))
    pixels = torch.rand(1, 3, 32, 32)
    channels = [spec.channels for spec in model.config.plan().encoders]
    with masked(model.model, {1}):
        found = fused(model, pixels).split(channels, dim=-1)
    whole = fused(model, pixels).split(channels, dim=-1)
    assert not found[1].any()
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[2], whole[2])


@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_windows_hold_the_weights_that_patch_mining_uses_where_their_keys_lie(native):
    model = model_with({"kind": "patch_mining", "heads": 2, "native": native})
    fusion, given, pixels = model.model.fusion, {}, torch.rand(2, 3, 32, 32)
    watching = {i: lambda maps, i=i: given.setdefault(i, maps) for i in (0, 1)}
    with changed(model.model, watching):
        mined = fused(model, pixels)
    specs = model.config.plan().offered
    low, high = (whole_map(given[i], specs[i]) for i in (0, 1))
    torch.testing.assert_close(high.tokens, model.model.encoders[1](pixels).tokens)
    weights = window_weights(fusion, low, high)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    values = fusion.value(high.windows(fusion.window)).unflatten(-1, (2, -1))
    read = torch.einsum("ienm,inmec->inec", weights, values).flatten(2)
    torch.testing.assert_close(low.tokens + read, mined, atol=1e-5, rtol=1e-4)
    numbers = torch.arange(high.tokens.shape[1], dtype=torch.float32).view(1, -1, 1)
    places = FeatureMap(numbers, high.grid).windows(fusion.window).squeeze(-1)
    expected = numbers.view(1, *high.grid)
    assert torch.equal(laid_out(places, low.grid, fusion.window), expected)
    assert evenness(torch.full((1, 1, 3, 8), 1 / 8)) == pytest.approx(1)
    assert evenness(torch.eye(8).view(1, 1, 8, 8)) == pytest.approx(0)


def read_gates(model, pixels):
    given = {}
    watching = {i: lambda maps, i=i: given.setdefault(i, maps) for i in (0, 1)}
    specs = model.config.plan().offered
    reader = reader_of(model.model.fusion, specs)
    assert reader is not None
    with reader.listening() as heard, changed(model.model, watching), recording() as tape:
        found = fused(model, pixels)
    maps = [whole_map(given[i], spec) for i, spec in enumerate(specs)]
    return reader.read(Seen(maps, found, tuple(tape), pixels), heard), heard, tape


@torch.no_grad()
def test_gates_of_every_fusion_that_weighs_encoders():
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    mome = part(FUSIONS, "mixture_of_vision_experts")
    (gate,), _, tape = read_gates(model_with(mome), pixels)
    torch.testing.assert_close(gate.weights.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(gate.sizes.gather(1, tape[0].indices), tape[0].norms)
    assert reader_of(model_with({**mome, "weights": "add"}).model.fusion, []) is None

    model = model_with(part(FUSIONS, "mixture_of_resolution"))
    (gate, end), heard, _ = read_gates(model, pixels)
    adapter = model.model.fusion.adapters[0]
    _, slow = heard["adapters.0"][0]
    seen = adapter.slow_proj(torch.nn.functional.gelu(adapter.slow_conv(slow.to_nchw())))
    seen = torch.nn.functional.avg_pool2d(seen, 2)  # its grid is twice as fine
    torch.testing.assert_close(gate.sizes[:, 1], gate.weights[:, 1].abs() * seen.flatten(1).norm(dim=1))
    assert (end.weights, end.sizes.shape) == (None, (2, 2))

    model = model_with(part(FUSIONS, "spatial_aggregator"))
    with torch.no_grad():
        for layer in model.model.fusion.layers:
            for key in layer.keys:
                key[1].weight.zero_()
    found, _, _ = read_gates(model, pixels)
    cells = torch.tensor([math.prod(side) for side in model.model.fusion.parts], dtype=torch.float32)
    for gate in found:  # keys that are all alike: attention by the number of cells alone
        torch.testing.assert_close(gate.weights, (cells / cells.sum()).expand(2, 2))

    found, _, _ = read_gates(
        model_with({**part(FUSIONS, "spatial_aggregator"), "aggregation": "separate"}), pixels
    )
    for gate in found:
        torch.testing.assert_close(gate.weights.sum(1), torch.ones(2))
        assert (gate.sizes > 0).all()

    (share, added), _, _ = read_gates(model_with(part(FUSIONS, "deformable")), pixels)
    assert share.weights[:, 0].isnan().all()
    torch.testing.assert_close(share.weights[:, 1], torch.ones(2))
    assert (added.sizes > 0).all()


def test_a_strip_has_no_places_in_common_and_grids_meet_at_the_coarsest():
    def map_of(rows, columns):
        return FeatureMap(torch.zeros(1, rows * columns, 2), (rows, columns))

    assert _common_grid([map_of(4, 4), None, map_of(2, 6)]) == (2, 4)
    assert _common_grid([map_of(4, 4), map_of(1, 5)]) is None
    assert _common_grid([map_of(1, 5), map_of(1, 5)]) == (1, 5)
    levels = [FeatureMap(torch.ones(1, 4, 2), (2, 2)), FeatureMap(torch.zeros(1, 16, 3), (4, 4))]
    assert whole_map(levels, VisionSpec((4, 4), 5)).tokens.sum((0, 1)).tolist() == [16, 16, 0, 0, 0]


def test_too_many_subsets_and_comparisons_without_them_are_refused():
    questions = Questions(benchmark=None)
    many = Answering("many", model_with({"kind": "channel_concat"}, ["clip"] * 6), None, questions)
    with pytest.raises(InputError, match="64 subsets"):
        Subject(many, subsets=True)
    assert [len(kept) for kept, _ in many.subsets()].count(3) == 20
    with pytest.raises(InputError, match="give --subsets"):
        Subject(many, against={"other": lambda: many})
