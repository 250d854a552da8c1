"""From a benchmark to its figures: nothing leaks, nothing is dropped, controls tell looking from guessing."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmix.core.errors import InputError, SampleError, VlmixError
from vlmix.core.parts import ENCODERS
from vlmix.core.sample import Answer, Decoding, ImageRef, Sample, Turn
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.controls import blinded, majority_answer, majority_by_task, question_of
from vlmix.evals.report import as_json
from vlmix.evals.responder import CannedResponder, ModelResponder
from vlmix.evals.run import evaluate
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.models.tokenization import train_tokenizer

pytestmark = pytest.mark.flow


class Looker:
    """Knows the right answer to every picture, and gives it to whatever picture it is shown."""

    def __init__(self, samples):
        self.answers = {self._seen(sample): sample.target for sample in samples}
        self.asked = []

    def _seen(self, sample):
        return sample.images[0].open().tobytes()

    def respond(self, samples, decoding):
        for sample in samples:
            self.asked.append(sample)
            yield Answer(sample.id, self.answers[self._seen(sample)])


@pytest.fixture(scope="module")
def benchmark():
    return SynthQa(SynthQaSettings(size=450))


def test_looking_beats_the_controls_and_the_blind_control_falls_to_the_prior(benchmark):
    looker, told = Looker(benchmark.samples()), []
    result = evaluate(looker, benchmark, progress=lambda *step: told.append(step))
    prior = result.majority_by_task.intervals["accuracy"]
    assert result.model.figures == {"accuracy": 1.0, "small_text": 1.0}
    assert result.blind is not None
    assert len(result.blind.scores) == 450
    assert result.blind.intervals["accuracy"].low <= prior.value
    assert result.blind.figures["accuracy"] > 0.05, "yes/no questions are still right half of the time"
    assert result.model.intervals["accuracy"].low > prior.high > result.majority.intervals["accuracy"].value
    assert {sample.target for sample in looker.asked} == {None}
    assert all(not sample.meta and sample.turns[-1].role == "user" for sample in looker.asked)
    assert [step for step in told if step[1] == step[2]] == [
        ("questions", 450, 450),
        ("blind control", 450, 450),
    ]


def test_a_responder_that_ignores_pictures_scores_the_same_blind_and_no_better_than_the_prior(benchmark):
    samples, rng = benchmark.samples(), random.Random(1)
    commonest = majority_by_task(samples)
    by_rule = evaluate(CannedResponder({s.id: commonest[s.task] for s in samples}), benchmark)
    assert by_rule.blind is not None
    assert by_rule.blind.figures == by_rule.model.figures == by_rule.majority_by_task.figures
    targets = {task: [s.target for s in samples if s.task == task] for task in commonest}
    guessed = evaluate(CannedResponder({s.id: rng.choice(targets[s.task]) for s in samples}), benchmark)
    assert guessed.model.intervals["accuracy"].low <= guessed.majority_by_task.figures["accuracy"]


def test_the_limit_asks_the_first_questions_only(benchmark):
    result = evaluate(CannedResponder({}), benchmark, limit=20, blind=False)
    assert [answer.sample_id for answer in result.model.answers] == [s.id for s in benchmark.samples()[:20]]
    assert (result.model.failed, result.blind) == (20, None)
    with pytest.raises(InputError, match="no question"):
        evaluate(CannedResponder({}), benchmark, limit=0)


@pytest.mark.parametrize("change", ["drop the last", "swap two", "add one"])
def test_a_responder_that_loses_count_is_an_error(benchmark, change):
    class Sloppy:
        def respond(self, samples, decoding):
            answers = [Answer(sample.id, "x") for sample in samples]
            if change == "drop the last":
                answers.pop()
            elif change == "swap two":
                answers[3], answers[4] = answers[4], answers[3]
            else:
                answers.append(answers[-1])
            return iter(answers)

    with pytest.raises(VlmixError, match="one answer each, in order"):
        evaluate(Sloppy(), benchmark, limit=10)


def pictured(name, task, group, images):
    parts = tuple(ImageRef(f"{name} {i}".encode()) for i in range(images))
    return Sample(name, (Turn("user", (*parts[:1], "what?", *parts[1:])),), "x", task, group)


@given(
    st.lists(
        st.tuples(st.sampled_from("pq"), st.sampled_from(["", "g", "h"]), st.integers(0, 2)), max_size=30
    ),
    st.integers(0, 5),
)
def test_exchanged_pictures_come_from_another_group_of_the_same_task_and_none_is_lost(rows, seed):
    samples = [pictured(f"s{i}", *row) for i, row in enumerate(rows)]
    by_id = {s.id: s for s in samples}
    owners = {image.source: s for s in samples for image in s.images}
    shuffled = blinded(samples, seed)
    assert [s.id for s in shuffled] == sorted((s.id for s in shuffled), key=lambda name: int(name[1:]))
    for sample in shuffled:
        own = by_id[sample.id]
        assert replace(sample, turns=own.turns) == own
        assert [len(turn.parts) for turn in sample.turns] == [len(turn.parts) for turn in own.turns]
        donors = {owners[image.source].id: owners[image.source] for image in sample.images}
        assert len(donors) == min(1, len(own.images)), "the pictures of one question come from one question"
        for donor in donors.values():
            assert donor.task == own.task
            assert donor.id != own.id
            assert not own.group or donor.group != own.group
    used = Counter(image.source for s in shuffled for image in s.images)
    assert used == Counter(image.source for s in shuffled for image in by_id[s.id].images)
    assert blinded(samples, seed) == shuffled
    cells = Counter((s.task, len(s.images)) for s in samples)
    groups = Counter((s.task, len(s.images), s.group) for s in samples if s.group)
    for (task, images), size in cells.items():
        largest = max([n for (*cell, _), n in groups.items() if cell == [task, images]], default=1)
        kept = sum((s.task, len(s.images)) == (task, images) for s in shuffled)
        assert kept == (size if images == 0 or 2 * largest <= size else 0)


def test_a_question_is_the_conversation_up_to_the_last_user_turn():
    turns = tuple(Turn(role, (role,)) for role in ("system", "user", "assistant", "user", "assistant"))
    sample = Sample("s", turns, "yes", meta={"answer": "yes"})
    assert question_of(sample) == Sample("s", turns[:4])
    assert question_of(replace(sample, turns=turns[:4])) == Sample("s", turns[:4])
    for bad in ((), turns[:1], turns[2:3]):
        with pytest.raises(SampleError, match="'s' has no user turn to answer"):
            question_of(replace(sample, turns=bad))


def test_the_commonest_answer_counts_every_accepted_target_and_breaks_ties_by_name():
    samples = [
        Sample(str(i), (), t, task) for i, (t, task) in enumerate([(("b", "a"), "p"), ("b", "p"), ("a", "q")])
    ]
    assert majority_answer(samples) == "a"
    assert majority_by_task(samples) == {"p": "b", "q": "a"}
    assert majority_answer([Sample("s", ())]) == ""


@pytest.fixture(scope="module")
def model_and_processor(benchmark):
    torch.manual_seed(0)
    texts = [turn.text for sample in benchmark.samples()[:50] for turn in sample.turns]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    encoder = ENCODERS.get("clip").settings_class.tiny().model_dump()
    decoder = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    config = VlmixConfig(
        text_config=decoder,
        encoders=[encoder],
        fusion={"kind": "single"},
        projector={"kind": "linear"},
        image_size=32,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = VlmixProcessor(
        VlmixImageProcessor(image_size=32), tokenizer, image_seq_length=config.image_seq_length
    )
    model = VlmixForConditionalGeneration(config)
    with torch.no_grad():  # wider than a fresh model, so that its answers depend on what it sees
        for weight in model.parameters():
            weight.mul_(4.0)
    return model, processor


def test_a_model_answers_the_same_in_any_batch_and_order_and_counts_what_it_cannot_read(
    benchmark, model_and_processor, tmp_path
):
    model, processor = model_and_processor
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [question_of(sample) for sample in benchmark.samples()[:20]]
    samples[3] = replace(samples[3], turns=(Turn("user", (ImageRef(broken), "what?")),))
    samples[5] = replace(samples[5], turns=(Turn("user", (*samples[5].images, "long " * 200)),))
    samples[7] = replace(samples[7], turns=(Turn("user", ("no picture here",)),))

    def answers(rows, batch_size, beams=1):
        decoding = Decoding(max_new_tokens=6, batch_size=batch_size, beams=beams)
        found = list(ModelResponder(model, processor).respond(rows, decoding))
        assert [answer.sample_id for answer in found] == [row.id for row in rows]
        return {answer.sample_id: (answer.text, answer.tokens, answer.error) for answer in found}

    alone = answers(samples, 1)
    assert len({text for text, _, _ in alone.values()}) > 5, (
        "the answers must differ for this test to see anything"
    )
    assert all(0 < tokens <= 6 for _, tokens, error in alone.values() if not error)
    failed = [sample.id for sample in samples if alone[sample.id][2]]
    assert failed == [samples[3].id, samples[5].id]
    assert "broken.png" in alone[samples[3].id][2]
    assert "tokens" in alone[samples[5].id][2]
    shuffled = random.Random(2).sample(samples, len(samples))
    assert answers(samples, 4) == answers(samples, 64) == answers(shuffled, 3) == alone
    assert answers(samples, 1, beams=3) == answers(samples, 8, beams=3)
    assert not model.training


def test_drawn_answers_are_fixed_by_the_seed_and_leave_the_random_state_alone(benchmark, model_and_processor):
    samples, decoding = benchmark.samples()[:8], Decoding(max_new_tokens=6, temperature=1.0)
    state = torch.get_rng_state()
    one, same, other = (
        [a.text for a in ModelResponder(*model_and_processor, seed=seed).respond(samples, decoding)]
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_judged_whole_and_twice_the_same(benchmark, model_and_processor):
    model, processor = model_and_processor
    responder = ModelResponder(model, processor)
    first, again = (
        evaluate(responder, benchmark, Decoding(max_new_tokens=3, batch_size=size), limit=24)
        for size in (5, 24)
    )
    assert first.model.failed == 0
    assert first.model.seconds > 0
    assert [a.text for a in first.model.answers] == [a.text for a in again.model.answers]
    assert as_json(first) == as_json(again)
