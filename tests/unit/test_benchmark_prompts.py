"""The exact text of questions, benchmark by benchmark and variant by variant.

A key is a benchmark's name with settings behind it, as ``--set`` takes them; its value is the text of the
first question of the tiny set, or a list of the texts of the first several.
"""

import json
from pathlib import Path

import pytest

from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.evals.benchmarks._official import OfficialBenchmark

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "benchmark_prompts.json").read_text(encoding="utf-8")
)
OFFICIAL = [name for name in BENCHMARKS.names() if issubclass(BENCHMARKS.get(name), OfficialBenchmark)]


def value_of(written):
    """A setting as it is written behind ``=``: JSON, or text."""
    try:
        return json.loads(written)
    except ValueError:
        return written


@pytest.mark.parametrize("key", GOLDEN)
def test_questions_are_asked_as_published(tmp_path, key):
    name, *settings = key.split(" ")
    tiny = BENCHMARKS.get(name).tiny(tmp_path)
    changed = {pair.partition("=")[0]: value_of(pair.partition("=")[2]) for pair in settings}
    raw = {**tiny.settings.model_dump(mode="json"), **changed}
    samples = type(tiny)(read_part(BENCHMARKS, raw)).samples()
    wanted = GOLDEN[key] if isinstance(GOLDEN[key], list) else [GOLDEN[key]]
    assert [sample.turns[-1].text for sample in samples[: len(wanted)]] == wanted


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_benchmark_has_an_entry_for_its_own_prompt(name):
    assert name in GOLDEN
