"""MoME at toy size: both stages, stopped and resumed around the replication, and asked."""

import pytest

from tests.flow.test_resume import stop_after
from tests.runs import train
from vlmix.core.errors import InterruptedRunError
from vlmix.core.sample import Decoding, Sample, Turn
from vlmix.evals.responder import ModelResponder
from vlmix.models.loading import load
from vlmix.train.recipe_file import load_recipe
from vlmix.train.tiny import shrunk

pytestmark = pytest.mark.flow


def test_it_resumes_on_either_side_of_the_replication_and_answers_alike_in_any_batch(tmp_path, monkeypatch):
    saved = [f"stages.{stage}.save_every_steps=1" for stage in (0, 1)]
    recipe = shrunk(load_recipe("mome/mome", saved), tmp_path)
    train(recipe, tmp_path / "whole")
    weights = (tmp_path / "whole/model/model.safetensors").read_bytes()
    for steps in (2, 3):
        out = tmp_path / f"stopped-{steps}"
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(InterruptedRunError):
                train(recipe, out)
        train(recipe, out, resume=True)
        assert (out / "model/model.safetensors").read_bytes() == weights
    model, processor = load(tmp_path / "whole", "cpu")
    assert [mixture["count"] for mixture in model.config.experts] == [4]
    asked = [Sample(str(i), (Turn("user", (text,)),)) for i, text in enumerate(["what?", "how many", "a"])]
    answers = [
        [
            answer.text
            for answer in ModelResponder(model, processor).respond(asked, Decoding(4, batch_size=size))
        ]
        for size in (1, 3)
    ]
    assert answers[0] == answers[1]
