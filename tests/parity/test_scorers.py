"""Every scoring rule against what the official scorer gave, row by row, for every protocol."""

import json
from functools import cache
from pathlib import Path

import pytest

from vlmix.core.parts import SCORERS
from vlmix.evals.scored import read_rows

FOLDER = Path(__file__).parents[2].parent / "shared" / "metrics"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared folder of official scores is absent"),
]
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}

# How many pictures CIDEr's rare words were counted in; with fewer in the file it cannot come out the same.
WHOLE = {"coco_caption": 80}
UNREAD = {False, "other", "FAILED", "Z"}  # how the scripts spell an answer that they could not read
# Which of the file's fields says what a protocol understood, where that is also what `parsed` means.
UNDERSTOOD = {
    ("gqa", "gqa_eval_after_llava_convert"): "converted_answer",
    ("mathvista", "mathvista_official"): "normalised_prediction",
    ("mmbench", "vlmevalkit_circular_exact"): "parsed",
    ("mme", "lmms_eval"): "parsed_lmms",
    ("mme", "mme_eval_tool"): "parsed",
    ("mme_lavin_real", "lmms_eval"): "parsed_lmms",
    ("mme_lavin_real", "mme_eval_tool"): "parsed",
    ("pope", "pope_official"): "parsed",
    ("scienceqa_img", "llava_eval_science_qa"): "parsed",
    ("textvqa", "lmms_eval"): "normalised_answer",
    ("textvqa", "m4c_evaluator"): "normalised_answer",
    ("vqav2", "llava_convert_then_vqaeval"): "llava_submitted_answer",
    ("vqav2", "lmms_eval"): "lmms_normalised_answer",
}


@cache
def golden(benchmark):
    return json.loads(FILES[benchmark].read_text(encoding="utf-8"))


@cache
def judged(benchmark, protocol):
    """The file's own rows, read as the command reads them, with our judgements and aggregates."""
    scorer = SCORERS.get(benchmark)
    lines, malformed = read_rows(FILES[benchmark], scorer)
    assert not malformed
    rows = [line.row for line in lines]
    found = scorer().judge(rows, protocol)
    return list(zip(golden(benchmark)["samples"], found, strict=True)), scorer().summarise(
        rows, found, protocol
    )


def every_protocol():
    return [(name, protocol) for name in FILES for protocol in golden(name)["protocols"]]


def tolerance(benchmark, protocol):
    """1e-6, as the golden files ask for; where a score is percent with two decimals, 0.01."""
    full = SCORERS.get(benchmark).protocols[protocol].full
    return 0.01 if full == 100 else 1e-6


@pytest.mark.parametrize(("benchmark", "protocol"), every_protocol())
def test_rows_score_as_the_official_scorer_scored_them(benchmark, protocol):
    if len(golden(benchmark)["samples"]) < WHOLE.get(benchmark, 0):
        pytest.skip("the file holds a part of the pictures that CIDEr was computed over")
    margin, wrong = tolerance(benchmark, protocol), []
    for sample, ours in judged(benchmark, protocol)[0]:
        wanted = sample["scores"][protocol]
        if sample.get("random_fallback"):
            continue  # drawn in the order of the whole set, of which the file holds a part
        if wanted is None or ours.value is None:
            agrees = wanted is ours.value
        else:
            agrees = abs(ours.value - wanted) <= margin
        if not agrees:
            wrong.append((sample["id"], sample["gold"], sample["answer"], wanted, ours.value))
    assert not wrong, f"{len(wrong)} of {len(judged(benchmark, protocol)[0])} rows differ: {wrong[:10]}"


@pytest.mark.parametrize("benchmark", FILES)
def test_protocols_are_those_of_the_file_and_the_official_one_is_first(benchmark):
    scorer = SCORERS.get(benchmark)
    assert scorer.official() == golden(benchmark)["primary_protocol"]
    assert set(golden(benchmark)["protocols"]) <= set(scorer.protocols)


@pytest.mark.parametrize(("benchmark", "protocol"), [key for key in UNDERSTOOD if key[0] in FILES])
def test_answers_are_understood_as_the_official_scorer_did(benchmark, protocol):
    field = UNDERSTOOD[benchmark, protocol]
    for sample, ours in judged(benchmark, protocol)[0]:
        if sample[field] in UNREAD:
            assert (ours.state in {"unparsed", "missing"}) or ours.parsed == sample[field], sample["id"]
        elif sample[field] is not None:
            assert ours.parsed == sample[field], sample["id"]


@pytest.mark.parametrize("protocol", ["ptb", "simple"])
def test_captions_have_the_official_words_and_further_scores(protocol):
    if "coco_caption" not in FILES:
        pytest.skip("the shared folder of official scores is absent")
    for sample, ours in judged("coco_caption", protocol)[0]:
        assert ours.parsed == sample["tokenized_answer"][protocol]
        wanted = {name: value for name, value in sample["score_detail"][protocol].items() if name != "CIDEr"}
        assert {name: ours.detail[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("protocol", ["mme_eval_tool", "lmms_eval", "lmms_eval_eagle_fork"])
def test_aggregates_of_real_answers_are_those_the_tool_printed(protocol):
    wanted, found = golden("mme_lavin_real")["summary"][protocol], judged("mme_lavin_real", protocol)[1]
    for group, value in wanted.items():
        values = value if isinstance(value, dict) else {"": value}
        ours = found[group] if isinstance(found[group], dict) else {"": found[group]}
        assert {name: ours[name] for name in values} == pytest.approx(values, abs=1e-6)
