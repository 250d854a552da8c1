"""What `make bench-continual` runs is what `vlmix train` runs, and its verdicts follow from its figures."""

import importlib.util
import sys

import pytest

from tests import runs
from tests.conftest import ROOT
from vlmix.core.settings import read_settings
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe import Recipe

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as where the script runs
    spec = importlib.util.spec_from_file_location("continual_claims", ROOT / "benchmarks/continual_claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def mini(claims):
    return claims.Miniature(3, claims.Sizes(language=3, align=2, one_shot=3, task=3))


def as_recipe(claims, mini, kind, rate, tokenizer):
    """The same run of the sequence as a recipe, with the tokenizer that was trained on all questions."""
    raw = mini.recipe.model_dump(mode="json")
    mini.processor.tokenizer.save_pretrained(tokenizer)
    raw["model"]["tokenizer"] = {"weights": str(tokenizer)}
    language, align, last = raw["stages"]
    raw["stages"] = [language, align]
    for place, (task,) in enumerate(claims.TASKS["sequence"]):
        cells = {
            "kind": "cells",
            "tasks": [task],
            "seed": mini.seed + 2000 + place,
            "noise": mini.sizes.noise,
        }
        train = dict.fromkeys(("projector.*", "language_model.*"), rate)
        more = {"name": task, "task": task, "steps": mini.sizes.task, "train": train}
        raw["stages"].append({**last, **more, "data": [{"source": cells}]})
    raw["continual"] = {"kind": kind, **claims.METHODS[kind]}
    return read_settings(Recipe, raw)


@pytest.mark.parametrize("kind", ["soft_targets", "rehearsal"])
def test_a_run_of_the_benchmark_is_a_run_of_the_library(claims, mini, kind, tmp_path):
    mini.run("sequence", kind, 1e-3)
    runs.train(as_recipe(claims, mini, kind, 1e-3, tmp_path / "words"), tmp_path / "run")
    other = VlmixForConditionalGeneration.from_pretrained(tmp_path / "run/model", local_files_only=True)
    ours, theirs = mini.model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    moved = sum((tensor - mini.base[name]).abs().sum() for name, tensor in ours.items())
    apart = sum((tensor - theirs[name]).abs().sum() for name, tensor in ours.items())
    # Sums in another order: Adam turns a last bit of a gradient near zero into a step of its own size.
    assert moved > 1
    assert apart < 1e-3 * moved


def test_verdicts_follow_from_paired_differences(claims):
    def table(naive, lora):
        return {"naive": {"delta_harmonic": {"seeds": naive}}, "lora": {"delta_harmonic": {"seeds": lora}}}

    asked = ("lora forgets less than naive", "delta_harmonic", "naive", "lora")
    cases = {"reproduced": [1.0, 2.0, 1.5], "reversed": [9.0, 10.0, 9.5], "undecided": [4.0, 7.0, 5.0]}
    for verdict, lora in cases.items():
        assert claims.judged(table([5.0, 6.0, 5.5], lora), *asked)["verdict"] == verdict
    methods = {"naive", "lora", "soft_targets", "msgm"}
    for setting in claims.TASKS:
        every = {m: {k: {"seeds": [1.0, 2.0]} for k in ("delta_harmonic", "vl_harmonic")} for m in methods}
        assert all(found["verdict"] == "undecided" for found in claims.claims(every, setting))
