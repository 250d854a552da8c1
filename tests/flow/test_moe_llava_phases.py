"""MoE-LLaVA's phases at toy size: experts put in before the last one, which is stopped and resumed."""

import pytest
from safetensors.torch import load_file

from tests.flow.test_resume import stop_after
from tests.runs import digest, told, train
from vlmix.core.errors import InterruptedRunError
from vlmix.core.settings import read_settings
from vlmix.models.configuration import VlmixConfig
from vlmix.train.recipe import Recipe
from vlmix.train.recipe_file import load_recipe
from vlmix.train.tiny import shrunk

pytestmark = pytest.mark.flow
LAST = 3  # steps of the phase with experts


def phases(name, folder):
    """A recipe at toy size, its last phase with a checkpoint after every step."""
    raw = shrunk(load_recipe(name), folder).model_dump(mode="json")
    raw["stages"][-1] |= {"steps": LAST, "save_every_steps": 1}
    return read_settings(Recipe, {**raw, "evals": []})


@pytest.mark.parametrize("name", ["moe_llava/tiny", "moe_llava/stablelm_1_6b_as_released"])
def test_a_run_stopped_among_experts_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    recipe = phases(name, tmp_path)
    assert "max |change of a logit|" in train(recipe, tmp_path / "whole")
    before = sum(stage.steps for stage in recipe.stages[:-1])
    with monkeypatch.context() as patch:
        stop_after(patch, before + 2)
        with pytest.raises(InterruptedRunError, match="--resume"):
            train(recipe, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()
    assert "resuming stage" in train(recipe, tmp_path / "run", resume=True)
    assert told(tmp_path / "run") == told(tmp_path / "whole")
    last = f"checkpoints/{len(recipe.stages)}-{recipe.stages[-1].name}-{LAST:07}"
    assert digest(tmp_path / "run" / last) == digest(tmp_path / "whole" / last)
    one, other = (tmp_path / run / "model" for run in ("run", "whole"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    experts = [key for key in load_file(one / "model.safetensors") if ".mlp.experts." in key]
    assert experts
    assert len(VlmixConfig.from_pretrained(one).experts or []) == 1
