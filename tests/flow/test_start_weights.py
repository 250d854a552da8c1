"""Where a run begins: other runs, published weights, tokenizers that lack tokens."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.runs import LANGUAGE, TINY, one_stage, recipe, stage, synth, train
from vlmix.core.errors import (
    CheckpointError,
    RecipeError,
)
from vlmix.models.plan import parameter_count, shape_only
from vlmix.train.build import build, recipe_config
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.costs import stage_costs
from vlmix.train.starting import check_starts

pytestmark = pytest.mark.flow
WORDS = {**LANGUAGE, "vocab_size": 300}


def test_a_stage_may_start_from_another_model(whole, tmp_path):
    kept = {**TINY["model"], "tokenizer": {"weights": str(whole[0] / "model")}}
    only = stage("a", {"projector.*": 1e-9}, synth("colour"), steps=1, start_from=str(whole[0] / "model"))
    train(recipe(model=kept, stages=[only]), tmp_path / "run")
    ours = load_file(tmp_path / "run" / "model" / "model.safetensors")
    theirs = load_file(whole[0] / "model" / "model.safetensors")
    assert all(torch.allclose(ours[name], tensor, atol=1e-6) for name, tensor in theirs.items())
    with pytest.raises(CheckpointError, match=r"start_from: .* has no config"):
        train(one_stage(start_from=str(tmp_path)), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(CheckpointError, match="do not fit"):  # another tokenizer, another size
        train(one_stage(start_from=str(whole[0] / "model")), tmp_path / "other")


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ([], [{"layers": "all"}], r"has 0 layers of experts, and .*so far, 2 layers .*is dense.*upcycle"),
        ([{"count": 3}], [{"count": 2}], r"1 layers of experts \(language_model: 1 of 3.*1 of 2.*'count': 3"),
        ([{"count": 2}], [{"count": 2, "layers": "all"}], r"1 of 2, ffn, router topk\).*2 of 2, ffn"),
        ([{"count": 2}], [{"count": 2, "place": "projector"}], r"language_model: .*projector"),
        ([{"count": 2}], [{"count": 2, "router": {"kind": "sigmoid"}}], "router topk.*router sigmoid"),
        ([{"count": 2}], [{"count": 2, "place": "encoders.7"}], "cannot have .*no encoders.7"),
        ([{"count": 2}], [], r"so far, 0 layers of experts; .*Give the recipe the folder's"),
    ],
)
def test_other_experts_where_a_stage_starts_are_found_before_anything_is_made(theirs, ours, said, tmp_path):
    """Although the stage is the second: the first would train in vain."""
    eyes = {**TINY["model"], "projector": {"kind": "mlp"}, "tokenizer": {"weights": "somewhere"}}
    folder = tmp_path / "other"
    recipe_config(recipe(model={**eyes, "language_model": WORDS, "experts": theirs})).save_pretrained(folder)
    second = stage("b", {"*": 1e-3}, synth("colour"), start_from=str(folder))
    first = stage("a", {"projector.*": 1e-3}, synth("colour"))
    what = recipe(model={**eyes, "language_model": WORDS, "experts": ours}, stages=[first, second])
    with pytest.raises(CheckpointError, match=f"(?s)^stages.1.start_from: {folder} .*{said}"):
        train(what, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match=r"stages\.1\.start_from"):
        stage_costs(what, recipe_config(what), images=1, text_tokens=8)


def test_the_same_experts_in_other_words_are_no_obstacle(tmp_path):
    words = {**TINY["model"], "language_model": WORDS, "tokenizer": {"weights": "somewhere"}}
    put_in = [{"kind": "upcycle", "experts": {"layers": "interval", "count": 2}}]
    theirs = recipe_config(recipe(model={**words, "experts": [{"layers": [0], "count": [2]}]}))
    theirs.save_pretrained(tmp_path / "other")
    first = stage("a", {"projector.*": 1e-3}, synth("colour"), before=put_in)
    second = stage("b", {"*": 1e-3}, synth("colour"), start_from=str(tmp_path / "other"))
    check_starts(recipe(model=words, stages=[first, second]))
    with pytest.raises(CheckpointError, match=r"stages.0.start_from.*so far, 0 layers"):
        check_starts(recipe(model=words, stages=[{**first, "start_from": str(tmp_path / "other")}]))
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is a model of type 'llama'"):
        check_starts(recipe(model=words, stages=[second]))


def test_published_weights_are_loaded_where_the_recipe_names_them(tmp_path):
    source = build(one_stage())
    source.model.model.language_model.save_pretrained(tmp_path / "words")
    source.processor.tokenizer.save_pretrained(tmp_path / "words")
    source.model.model.encoders[0].tower.save_pretrained(tmp_path / "eye")
    words, eye = {"weights": str(tmp_path / "words")}, {"weights": str(tmp_path / "eye")}
    first, second = TINY["model"]["encoders"]
    parts = {"language_model": words, "tokenizer": words, "encoders": [{**first, **eye}, second]}
    built = build(recipe(seed=5, model={**TINY["model"], **parts}))
    ours, theirs = unique_tensors(built.model), unique_tensors(source.model)
    equal = {name for name, tensor in ours.items() if torch.equal(tensor, theirs[name])}
    assert {name for name in ours if name.startswith(("model.language_model.", "model.encoders.0."))} <= equal
    assert "model.projector.linear.weight" not in equal
    assert "weights" not in built.model.config.encoders[0]
    late = [
        stage(
            "a", {"*": 1e-9}, synth("colour"), steps=1, before=[{"kind": "load_encoder", "encoder": 0, **eye}]
        )
    ]
    train(recipe(seed=5, stages=late), tmp_path / "run")
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    name = next(name for name in ours if name.startswith("model.encoders.0.") and theirs[name].std() > 0)
    assert torch.allclose(trained[name], theirs[name], atol=1e-6)


def test_a_recipe_may_say_what_its_weights_must_be_and_is_planned_without_them(tmp_path):
    source = build(one_stage())
    source.model.model.language_model.save_pretrained(tmp_path)
    source.processor.tokenizer.save_pretrained(tmp_path)
    said = {**LANGUAGE, "vocab_size": len(source.processor.tokenizer), "rope_theta": 10000.0}
    absent = {"weights": "somebody/not-here", "config": said}
    model = {**TINY["model"], "language_model": absent, "tokenizer": {"weights": "somebody/not-here"}}
    planned = recipe_config(recipe(model=model))
    assert planned.language.vocab_size == said["vocab_size"]
    assert parameter_count(shape_only(planned)) == parameter_count(source.model)
    with pytest.raises(CheckpointError, match=r"tokenizer\.weights 'somebody/not-here' cannot be read"):
        build(recipe(model=model))
    words = {"weights": str(tmp_path)}
    here = {**model, "language_model": {**words, "config": said}, "tokenizer": words}
    assert build(recipe(model=here)).model.config.language.rope_parameters["rope_theta"] == 10000.0
    wrong = {**said, "hidden_size": 24, "rope_theta": 500.0}
    with pytest.raises(CheckpointError, match=r"hidden_size is 16, in the recipe 24; rope_parameters is"):
        build(recipe(model={**here, "language_model": {**words, "config": wrong}}))


def test_a_language_model_gets_rows_for_tokens_its_tokenizer_lacked(tmp_path):
    bare = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    bare.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="b", unk_token="[UNK]").save_pretrained(tmp_path)
    published = LlamaForCausalLM(LlamaConfig(**{**LANGUAGE, "vocab_size": 3}))
    published.save_pretrained(tmp_path)
    weights = {"weights": str(tmp_path)}
    built = build(recipe(model={**TINY["model"], "language_model": weights, "tokenizer": weights}))
    rows = built.model.get_input_embeddings().weight
    assert built.processor.tokenizer.pad_token_id < rows.shape[0] == built.model.config.language.vocab_size
    assert torch.equal(rows[:3], published.get_input_embeddings().weight)


def test_a_language_model_smaller_than_its_tokenizer_is_refused(tmp_path):
    model = {**TINY["model"], "language_model": {**LANGUAGE, "vocab_size": 5}}
    with pytest.raises(RecipeError, match="5 is less than the tokenizer's"):
        train(recipe(model=model), tmp_path / "run")
