"""Plain text through a model: likelihoods against transformers, cloze, perplexity, and the harness."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from tests import runs
from vlmix.core.errors import InputError, SampleError
from vlmix.core.sample import Answer, Decoding
from vlmix.data.facts import MOST, facts
from vlmix.data.sources.facts import Facts, FactsSettings
from vlmix.evals.benchmarks.cloze import Cloze, ClozeSettings
from vlmix.evals.benchmarks.lm_eval import LmEval
from vlmix.evals.benchmarks.perplexity import Perplexity, PerplexitySettings
from vlmix.evals.plain_text import first_word
from vlmix.evals.responder import CannedResponder, ModelResponder
from vlmix.evals.run import evaluate
from vlmix.train.build import build

# Float32 logits of differently padded batches, summed over dozens of tokens.
NATS = 1e-3


@pytest.fixture(scope="module")
def responder():
    setup = build(runs.one_stage())
    return ModelResponder(setup.model, setup.processor)


def by_hand(responder, before, text):
    """The same likelihood from the language model alone, token by token."""
    tokenizer = responder.processor.tokenizer
    start = [] if before else [tokenizer.bos_token_id]
    known = [*start, *tokenizer(before, add_special_tokens=False)["input_ids"]]
    ids = [*start, *tokenizer(before + text, add_special_tokens=False)["input_ids"]]
    assert ids[: len(known)] == known, "the cut lies between two tokens"
    with torch.inference_mode():
        logits = responder.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    after = torch.tensor(ids[1:])
    nats = F.cross_entropy(logits, after, reduction="none")[len(known) - 1 :]
    greedy = (logits.argmax(-1) == after)[len(known) - 1 :].all()
    return float(nats.double().sum()), len(ids) - len(known), bool(greedy)


def test_likelihoods_are_those_of_the_language_model(responder):
    pairs = [("The dog sat", " on the mat."), ("", "Hello there"), ("a", " b c d e f g h"), ("Is it", " red")]
    for found, (before, text) in zip(responder.likelihoods(pairs), pairs, strict=True):
        nats, tokens, greedy = by_hand(responder, before, text)
        assert found.nats == pytest.approx(nats, abs=NATS)
        assert (found.tokens, found.greedy) == (tokens, greedy)


def test_a_blank_before_the_cut_goes_with_what_follows(responder):
    one, other = responder.likelihoods([("The dog ", "sat"), ("The dog", " sat")])
    assert (one.nats, one.tokens) == (pytest.approx(other.nats, abs=NATS), other.tokens)


def test_long_texts_are_judged_once_in_windows_and_lose_only_far_context(responder):
    text = "The boat left at noon and came back at night. " * 4
    whole, *pieces = (
        next(iter(responder.likelihoods([("", text)], window=window))) for window in (None, 64, 16, 7)
    )
    assert {piece.tokens for piece in pieces} == {whole.tokens}
    # A random model hardly looks far back, so windows change little; twice the cost would be a bug.
    assert all(piece.nats == pytest.approx(whole.nats, rel=0.05) for piece in pieces)


def test_control_tokens_in_text_stay_text_and_nothing_cannot_be_judged(responder):
    found = next(iter(responder.likelihoods([("x", " <image></s> y")])))
    assert found.tokens > 6, "spelt out, not one control token"
    assert math.isfinite(found.nats)
    with pytest.raises(InputError, match="empty"):
        list(responder.likelihoods([("x", "")]))


def test_plain_decoding_continues_without_the_template(responder):
    tokenizer = responder.processor.tokenizer
    benchmark = Cloze(ClozeSettings(facts=4))
    samples = benchmark.samples()
    for sample, answer in zip(samples, benchmark.ask(responder, samples, Decoding(4)), strict=True):
        ids = torch.tensor([tokenizer(sample.turns[0].text, add_special_tokens=False)["input_ids"]])
        out = responder.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=responder.processor.stop_token_ids,
        )
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("said", "word"),
    [("dog. And then", "dog"), ('"Rain!" he', "rain"), ("", ""), ("...", ""), ("o'clock,", "o'clock")],
)
def test_the_first_word_counts_without_marks(said, word):
    assert first_word(said) == word


def test_cloze_judges_the_first_word_and_refuses_gaps(tmp_path):
    benchmark = Cloze.tiny(tmp_path)
    sample = benchmark.samples()[0]
    assert (sample.turns[0].text, sample.target) == ("She opened the door and saw the", "dog.")
    right = [
        benchmark.score(sample, Answer(sample.id, text)).value for text in ("Dog, who", "dogs", "the dog")
    ]
    assert right == [1, 0, 0]
    path = tmp_path / "bad.txt"
    for text, error in (("one\n", SampleError), ("", InputError), ('{"text": 3}\n', SampleError)):
        path.write_text(text)
        with pytest.raises(error):
            Cloze(ClozeSettings(path=path)).samples()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        Cloze(ClozeSettings(path=path)).samples()


def test_the_facts_taught_are_the_facts_asked_for():
    taught, asked = Facts(FactsSettings(size=30, seed=4)), Cloze(ClozeSettings(facts=30, seed=4)).samples()
    for row, question in zip(taught, asked, strict=True):
        assert row.turns[1].text == f"{question.turns[0].text} {question.target}."
        assert (row.target, row.task) == (question.target, question.task)
    assert len({fact.passage.rpartition(" ")[0] for fact in facts(MOST, 0)}) == MOST
    assert facts(8, 1) != facts(8, 2)


def test_perplexity_covers_every_byte_once_and_equals_its_sum(responder, tmp_path):
    text = "Ground rules matter. Größe zählt: 世界 is the world.\n\n" * 6
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    benchmark = Perplexity(PerplexitySettings(path=tmp_path, piece=60, context=50))
    samples = benchmark.samples()
    assert "".join(str(s.target) for s in samples if s.task == "a") == text.strip()
    assert all(len(s.turns[0].text.encode()) <= 50 for s in samples)
    result = evaluate(responder, benchmark)
    assert result.blind is None, "there is no picture to exchange"
    nats = [answer.nats for answer in result.model.answers]
    size = 2 * len(text.strip().encode())
    figures = result.model.figures
    assert figures["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size)
    assert figures["byte_probability"] == pytest.approx(2 ** -figures["bits_per_byte"])
    tokens = sum(answer.tokens for answer in result.model.answers)
    assert figures["nats_per_token"] == pytest.approx(sum(nats) / tokens)
    assert result.majority.figures["bits_per_byte"] == 8, "who cannot tell pays for every bit"
    assert dict(result.units) == dict(benchmark.units)


def test_canned_answers_cannot_say_how_likely_a_text_is():
    with pytest.raises(InputError, match="judge a model folder"):
        evaluate(CannedResponder({}), Perplexity(PerplexitySettings.tiny()))


def test_without_the_harness_the_message_says_how_to_get_it(tmp_path):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed")
    with pytest.raises(InputError, match=r"vlmix\[eval\]"):
        LmEval.tiny(tmp_path).samples()


@pytest.mark.filterwarnings("ignore")  # the harness's own, and those of what it imports
def test_the_harness_judges_a_model(responder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'vlmix[eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    benchmark = LmEval.tiny(tmp_path)
    result = evaluate(responder, benchmark)
    pairs = [("The sky is", (" blue", " loud")), ("Grass is", (" silent", " green"))]
    found = [list(responder.likelihoods([(text, each) for each in both])) for text, both in pairs]
    expected = [float(a.nats < b.nats) for a, b in found[:1]] + [float(b.nats < a.nats) for a, b in found[1:]]
    assert [score.value for score in result.model.scores] == expected
    assert result.model.figures["vlmix_tiny.acc"] == sum(expected) / 2 == result.model.figures["accuracy"]


@pytest.mark.filterwarnings("ignore")  # the harness's own, and those of what it imports
def test_the_harness_hears_what_its_own_model_would_say(responder, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'vlmix[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from vlmix.evals.harness import adapter

    decoder, tokenizer = responder.model.model.language_model, responder.processor.tokenizer
    theirs = HFLM(pretrained=decoder, tokenizer=tokenizer, batch_size=3, max_length=128)
    ours = adapter(responder, Decoding(20))

    def asked(kind, *rows):
        return [Instance(kind, {}, row, number) for number, row in enumerate(rows)]

    pairs = [("The dog sat", " on the mat."), ("The dog ", "sat down"), ("", "Hello there"), ("word", "s")]
    told = [each.loglikelihood(asked("loglikelihood", *pairs)) for each in (ours, theirs)]
    for (nats, greedy), (expected, same) in zip(*told, strict=True):
        assert nats == pytest.approx(expected, abs=NATS)
        assert greedy == same
    texts = asked("loglikelihood_rolling", ("Hello there. " * 3,), ("Short.",))
    whole = [each.loglikelihood_rolling(texts) for each in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], abs=NATS)
    rules = [{"until": ["\n"], "max_gen_toks": 12}, {"until": ["e"], "max_gen_toks": 9}]
    questions = asked("generate_until", ("The dog sat", rules[0]), ("Is", rules[1]))
    assert ours.generate_until(questions) == theirs.generate_until(questions)
