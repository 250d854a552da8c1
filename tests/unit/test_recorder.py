"""The window into routing: counts a hand can check, halves that add up to the whole, bounds that hold."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests import tiny
from vlmix.core.errors import VlmixError
from vlmix.core.experts import ExpertSettings
from vlmix.core.sample import Answer, Decoding, Sample, Turn
from vlmix.core.tensors import Mixing, Routing
from vlmix.evals.verdict import judge_routing
from vlmix.evals.window import RoutingWindow
from vlmix.moe.balance import Positions, RoutingCounts
from vlmix.moe.recorder import Note, RoutingRecorder, notes_of
from vlmix.moe.recorder_paths import PathCounter
from vlmix.moe.recorder_tally import GROUPS
from vlmix.train.expert_loads import expert_loads, is_told

VISUAL, TEXT, WHOLE = range(3)


def note(name="a", experts=3, k=1, mixture=0, place="language_model", whole=False):
    return Note(name, mixture, place, experts, k, whole)


def routing(choices, experts=3, name="a", rows=1, weights=None, **more):
    """One that chose so, its probabilities even over what was chosen."""
    indices_TK = torch.tensor(choices)
    decisions, k = indices_TK.shape
    shares_TE = torch.zeros(decisions, experts).scatter(1, indices_TK, 1 / k)
    weights_TK = torch.full((decisions, k), 1 / k) if weights is None else torch.tensor(weights)
    shape = (rows, decisions // rows)
    return Routing(shape, shares_TE.log(), shares_TE, indices_TK, weights_TK, layer=name, **more)


def test_counts_of_a_small_batch_with_padding_and_drops():
    recorder = RoutingRecorder([note("a", 3, 2), note("b", 4, 1)])
    positions = Positions(
        torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[True, True, False], [True, False, True]])
    )
    kept = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0], [1, 1], [1, 1]]).bool()
    a = routing([[0, 1], [0, 2], [2, 1], [1, 0], [0, 1], [2, 2]], rows=2, kept=kept)
    b = routing([[3], [3], [0], [1], [0], [2]], experts=4, name="b", rows=2)
    recorder.add([a, b], positions)
    tally = recorder.tallies["a"]
    assert tally.tokens.tolist() == [3, 2, 0], "the padded position counts nowhere"
    assert tally.choices.tolist() == [[3, 2, 1], [1, 2, 1], [0, 0, 0]]
    assert tally.first.tolist() == [[2, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert tally.dropped.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert tally.unserved.tolist() == [1, 0, 0]
    assert tally.weights.tolist() == [[1.5, 1.0, 0.5], [0.5, 1.0, 0.5], [0, 0, 0]]
    assert tally.entropy.tolist() == pytest.approx([3 * math.log(2), 2 * math.log(2), 0])
    assert tally.together.tolist() == [[4, 3, 1], [3, 4, 1], [1, 1, 2]]
    assert recorder.paths[0]["visual"].counts == {"0>3": 2, "1>1": 1}
    assert recorder.paths[0]["text"].counts == {"2>0": 1, "0>0": 1}
    assert recorder.sets[0]["visual"].counts == {"0+1>3": 1, "0+2>3": 1, "0+1>1": 1}


@pytest.mark.parametrize("k", [1, 2, 3])
@settings(deadline=None)
@given(st.data())
def test_every_choice_of_every_token_is_counted_once_and_halves_add_up(k, data):
    experts, rows = data.draw(st.integers(k, 5)), data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.rand(2, rows * length, experts, generator=generator)
    real, visual = torch.rand(2, rows, length, generator=generator).gt(0.3)

    def watch(part):
        recorder = RoutingRecorder([note("a", experts, k), note("b", experts, k)])
        for start in part:
            at = slice(start * length, (start + 1) * length)
            found = [
                Routing((1, length), s[at], s[at].softmax(-1), s[at].topk(k).indices, s[at].topk(k).values)
                for s in scores
            ]
            named = [
                Routing(r.shape, r.logits, r.probabilities, r.indices, r.weights, layer=name)
                for r, name in zip(found, "ab", strict=True)
            ]
            recorder.add(named, Positions(real[start : start + 1], visual[start : start + 1]))
        return recorder

    whole, half = watch(range(rows)), watch(range(rows // 2))
    tally = whole.tallies["a"]
    assert tally.tokens.tolist() == [int((real & visual).sum()), int((real & ~visual).sum()), 0]
    assert torch.equal(tally.choices.sum(1), tally.tokens * k)
    assert torch.equal(tally.first.sum(1), tally.tokens)
    assert torch.equal(tally.together.diagonal(), tally.choices.sum(0))
    firsts = scores.argmax(-1).view(2, rows, length)
    for group, here in (("visual", real & visual), ("text", real & ~visual)):
        expected = Counter(f"{a}>{b}" for a, b in zip(*firsts[:, here].tolist(), strict=True))
        assert whole.paths[0][group].counts == expected
        assert whole.sets[0][group].total == (int(here.sum()) if k > 1 else 0)
    half.merge(watch(range(rows // 2, rows)))
    assert same(half.to_json()) == same(whole.to_json())
    assert RoutingRecorder.from_json(json.loads(json.dumps(whole.to_json()))).to_json() == whole.to_json()


def same(raw):
    """Sums without the last digits, which depend on the order of adding."""
    return json.loads(json.dumps(raw), parse_float=lambda text: round(float(text), 9))


def test_whole_rows_count_once_however_many_steps_decoding_takes():
    recorder = RoutingRecorder([note("a", 3, 1, whole=True)])
    decided = routing([[2], [0]], rows=2)
    recorder.add([decided], Positions(torch.ones(2, 5)))
    recorder.add([decided], Positions(torch.ones(2, 1)), again=True)
    assert recorder.tallies["a"].choices.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 1]]


def test_mixing_and_experts_that_choose_are_counted_as_what_they_are():
    soft, picked = note("soft", 2, 2, 0, "projector"), note("picked", 2, 1, 1, "encoders.0")
    recorder = RoutingRecorder([soft, picked])
    shares = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    slots = torch.tensor([[0], [1]])
    mixing = Mixing(torch.full((1, 2, 3), 1 / 3), shares.unsqueeze(0))
    mixed = Routing((1, 3), shares.log(), shares, slots, torch.ones(2, 1), mixing=mixing, layer="soft")
    # Expert 0 takes tokens 0 and 2, expert 1 takes token 0 and weighs it more; nobody takes token 1.
    chosen = Routing(
        (1, 3),
        shares.log(),
        shares,
        torch.tensor([[0], [0], [1], [1]]),
        torch.tensor([[0.25], [0.5], [0.75], [0.5]]),
        rows=torch.tensor([0, 2, 0, 2]),
        layer="picked",
    )
    recorder.add([mixed, chosen])
    tally = recorder.tallies["soft"]
    assert (tally.rule, tally.choices.sum(), tally.shares[VISUAL].tolist()) == ("all mix", 0, [1.25, 1.75])
    assert "no paths" in recorder.pathless[0]
    tally = recorder.tallies["picked"]
    assert (tally.rule, tally.choices[VISUAL].tolist()) == ("experts choose", [2, 2])
    assert tally.unserved.tolist() == [1, 0, 0]
    assert recorder.paths[1]["visual"].counts == {"1": 1, "-": 1, "0": 1}
    recorder.keep("picture", [mixed, chosen], Positions())
    kept = recorder.examples["picture"]
    assert kept["picked"]["experts"] == [[1, 0], [-1, -1], [0, 1]]
    assert kept["picked"]["weights"] == [[0.75, 0.25], [0, 0], [0.5, 0.5]]
    assert kept["soft"]["experts"][0] == [1]


def test_layers_of_different_length_have_counts_but_no_paths():
    recorder = RoutingRecorder([note("a", 3, 1, 0, "encoders.0"), note("b", 3, 1, 0, "encoders.0")])
    recorder.add([routing([[0], [1]]), routing([[0]], name="b")])
    assert "different numbers of tokens" in recorder.pathless[0]
    assert recorder.tallies["b"].choices.sum() == 1
    assert recorder.paths[0]["visual"].total == 0


def test_what_does_not_belong_together_is_refused():
    recorder = RoutingRecorder([note()])
    with pytest.raises(VlmixError, match="a decided for 2 tokens, and positions of 3"):
        recorder.add([routing([[0], [1]])], Positions(torch.ones(1, 3)))
    with pytest.raises(VlmixError, match="different models"):
        recorder.merge(RoutingRecorder([note(experts=4)]))
    with pytest.raises(VlmixError, match="schema"):
        RoutingRecorder.from_json({"schema": "vlmix.routing/9"})


def test_a_part_that_routes_by_itself_is_met_when_it_first_does():
    recorder, other = RoutingRecorder([]), RoutingRecorder([])
    for seen in (recorder, other):
        norms = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        found = routing([[0, 1], [1, 0]], 2, "fusion", 2, [[0.9, 0.1], [0.6, 0.4]], norms=norms)
        seen.add([found])
    recorder.merge(other)
    tally = recorder.tallies["fusion"]
    assert tally.tokens.tolist() == [0, 0, 4], "one decision for each picture"
    assert tally.takes_all
    assert tally.loads[WHOLE].tolist() == pytest.approx([2.6, 1.4]), "all take part, so weights are the load"
    assert tally.norms[WHOLE].tolist() == [6, 10]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=30), max_size=8), st.integers(1, 6))
def test_paths_that_do_not_fit_are_counted_within_the_stated_bound(batches, capacity):
    whole, halves = PathCounter(capacity), [PathCounter(capacity), PathCounter(capacity)]
    true = Counter[str]()
    for number, batch in enumerate(batches):
        found = Counter(map(str, batch))
        true += found
        whole.add(found)
        halves[number % 2].add(found)
    halves[0].merge(halves[1])
    for counter in (whole, halves[0]):
        assert counter.total == true.total()
        assert len(counter.counts) <= capacity
        assert counter.lost <= counter.total / (capacity + 1)
        assert all(0 <= true[path] - counter.counts.get(path, 0) <= counter.lost for path in true)
        assert counter.exact == (dict(true) == counter.counts) or len(true) > capacity


def test_what_was_written_down_goes_on_within_its_bound():
    recorder = RoutingRecorder([note(experts=5)], capacity=2)
    again = RoutingRecorder.from_json(json.loads(json.dumps(recorder.to_json())))
    for seen in (recorder, again):
        seen.add([routing([[0], [1], [2], [3], [4], [0]], 5)])
    assert again.to_json() == recorder.to_json()
    assert again.paths[0]["text"].counts == {"0": 1}


@pytest.mark.parametrize(
    ("loads", "k", "state"),
    [
        ([100, 100, 100, 100], 1, "balanced"),
        ([60, 60, 60, 220], 1, "uneven"),
        ([130, 130, 130, 2], 1, "unused experts"),
        ([390, 4, 3, 3], 1, "collapsed"),
        ([8, 8, 8, 8], 1, "balanced"),
        ([8, 8, 8, 7], 1, "too few to judge"),
    ],
)
def test_verdicts(loads, k, state):
    scale = 4 if sum(loads) < 100 else 1
    recorder = RoutingRecorder([note(experts=4, k=k)])
    choices = [[expert] for expert, load in enumerate(loads) for _ in range(load * scale)]
    recorder.add([routing(choices, 4)])
    verdict = judge_routing(recorder)
    assert (verdict.state, verdict.layers[0].state) == (state, state)
    assert verdict.sentence.startswith(state.capitalize())
    assert verdict.layers[0].most == max(loads) / sum(loads)


def test_two_experts_a_token_collapse_onto_two():
    recorder = RoutingRecorder([note(experts=4, k=2)])
    recorder.add([routing([[0, 1]] * 100 + [[2, 3]] * 2, 4)])
    assert judge_routing(recorder).state == "collapsed"


def test_where_all_experts_are_chosen_their_weights_are_judged():
    recorder = RoutingRecorder([note(experts=2, k=2)])
    recorder.add([routing([[0, 1]] * 100, 2, weights=[[0.98, 0.02]] * 100)])
    layer = judge_routing(recorder).layers[0]
    assert (layer.state, layer.most) == ("collapsed", pytest.approx(0.98))


def test_a_model_feeds_it():
    mixture = ExpertSettings(layers="all", count=(3, 4), router={"kind": "topk", "k": 2})
    model = tiny.VlmixForConditionalGeneration(tiny.config(experts=[mixture.model_dump()])).eval()
    ids = torch.tensor([[5, 6, 7, 8], [0, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    recorder = RoutingRecorder(notes_of(model))
    recorder.add(model(ids, attention_mask=mask).routing, Positions(mask, ids == tiny.PLACEHOLDER))
    assert [n.experts for n in recorder.notes.values()] == [3, 4]
    assert [int(t.choices[TEXT].sum()) for t in recorder.tallies.values()] == [14, 14]
    assert recorder.paths[0][GROUPS[TEXT]].total == 7


@pytest.mark.parametrize("cache", [True, False])
def test_every_word_is_read_once_by_a_model_that_keeps_no_cache_too(cache):
    """Three of five experts, rows of different length, and a prompt that would be read five times."""
    mixture = ExpertSettings(layers="all", count=5, router={"kind": "topk", "k": 3})
    model = tiny.VlmixForConditionalGeneration(tiny.config(experts=[mixture.model_dump()])).eval()
    model.generation_config.use_cache = cache
    ids = torch.randint(4, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    window = RoutingWindow(model, SimpleNamespace(stop_token_ids=[1]))
    with window.open():
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert found.shape == (3, 11)
    for tally in window.recorder.tallies.values():
        assert tally.tokens.tolist() == [0, int(mask.sum()) + 3 * 4, 0]
        assert tally.choices.sum() == 3 * tally.tokens.sum()
    assert model.generation_config.use_cache == cache


def test_questions_asked_one_by_one_are_counted_and_controls_are_not():
    """A harness asks so, and counts its questions anew for every task."""
    model = tiny.VlmixForConditionalGeneration(tiny.config(experts=[ExpertSettings().model_dump()])).eval()
    window = RoutingWindow(model, SimpleNamespace(stop_token_ids=[1]))

    class Echo:
        def respond(self, samples, decoding):
            for sample in samples:
                ids = torch.full((1, len(sample.turns[-1].text)), 7)
                model(input_ids=ids, past_key_values=DynamicCache(config=model.config.language))
                yield Answer(sample.id, "")

    def ask(name, *words):
        questions = [Sample(name, (Turn("user", (word,)),)) for word in words]
        assert len(list(watched.respond(iter(questions), Decoding()))) == len(words)

    watched = window.watch(Echo())
    (tally,) = window.recorder.tallies.values()
    for name, words, counted in [
        ("a", ["one"], 3),
        ("b", ["four"], 7),
        ("a", ["again"], 12),
        ("a", ["one"], 12),
    ]:
        ask(name, *words)
        assert int(tally.tokens.sum()) == counted, (name, words)


def test_training_says_how_even_the_load_of_a_step_was():
    counts = RoutingCounts({"a": torch.tensor([[6.0, 1, 0, 0], [1, 0, 0, 0]])})
    found = expert_loads(counts)
    assert found is not None
    assert found["a"] == pytest.approx({"most": 7 / 8, "unused": 2, "effective": 1.457}, abs=1e-3)
    assert expert_loads(RoutingCounts()) is expert_loads(None) is None
    assert [step for step in range(1, 26) if is_told(step, 25)] == [10, 20, 25]
