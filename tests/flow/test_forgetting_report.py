"""Tasks learnt one after the other through the command's own path: the report tells what was forgotten."""

import json

import pytest

from tests import runs
from vlmix.cli.flow import train_and_judge
from vlmix.core.errors import RecipeError

pytestmark = pytest.mark.flow
ASKED = {"kind": "synth_qa", "size": 4, "image_size": 48}


def learnt(name, *data, **more):
    return runs.stage(name, {"language_model.*": 1e-3, "projector.*": 1e-3}, *data, publish=True, **more)


def sequence(**changes):
    first = learnt("words", {"source": {"kind": "facts", "size": 8}}, chat_template="plain")
    stages = [first, *(learnt(f"see-{t}", runs.synth(t), task=t) for t in ("colour", "count"))]
    evals = [{"benchmark": {"kind": "cloze", "facts": 8}, "task": "language"}]
    evals += [{"benchmark": {**ASKED, "tasks": [t]}, "task": t} for t in ("colour", "count")]
    return runs.recipe(**{"stages": stages, "evals": evals, "continual": {"kind": "naive"}, **changes})


def test_every_task_is_judged_after_every_task_and_shown(tmp_path):
    train_and_judge(sequence(), tmp_path / "run", resume=False)
    found = json.loads((tmp_path / "run/report/forgetting.json").read_text())
    assert found["tasks"] == ["language", "colour", "count"]
    assert len(found["points"]) == 3, "before the first task, and after each"
    assert found["benchmarks"]["language"] == [
        f"language: {k}" for k in ("colour", "count", "place", "shape")
    ]
    assert found["means"]["harmonic"]["delta"][0] == 0
    page = (tmp_path / "run/report/report.html").read_text()
    assert "Forgetting" in page
    assert "data:image/png;base64" in page
    assert (tmp_path / "run/report/forgetting.png").stat().st_size > 1000


def test_a_task_without_a_benchmark_or_a_benchmark_without_a_task_is_refused():
    with pytest.raises(RecipeError, match="count has no `task"):
        sequence(evals=sequence().model_dump()["evals"][:2])
    with pytest.raises(RecipeError, match="no stage has the task taste"):
        sequence(evals=[{"benchmark": dict(ASKED), "task": "taste"}])
    stages = sequence().model_dump()["stages"]
    with pytest.raises(RecipeError, match="set `publish`"):
        sequence(stages=[*stages[:2], {**stages[2], "publish": False}])
