"""Runs that train low-rank adapters: what moves, resumed, begun from published weights and other runs."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.flow.test_resume import stop_after
from tests.runs import TINY, digest, recipe, stage, synth, told, train
from vlmix.cli.main import app
from vlmix.core.errors import CheckpointError, InputError, InterruptedRunError, PlanError
from vlmix.models.adapters import AdaptedLinear, merge_adapters
from vlmix.models.loading import load
from vlmix.models.plan import shape_only
from vlmix.models.quantised import dequantised, quantised
from vlmix.train.build import build, recipe_config
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.costs import stage_costs

pytestmark = pytest.mark.flow

ADAPTERS = [
    {"match": ["encoders.*"], "rank": 2},
    {"match": ["language_model.*"], "rank": 3, "alpha": 6, "dropout": 0.2},
]
TUNE = stage(
    "tune",
    {"encoders.1.*lora_*": 1e-2, "language_model.*lora_*": 1e-2, "projector.*": 1e-2},
    synth("colour"),
    steps=2,
)


def adapted(*stages, **model):
    return recipe(model={**TINY["model"], "adapters": ADAPTERS, **model}, stages=list(stages or (TUNE,)))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    train(adapted(), out)
    return out


def shown(processor):
    return processor(images=Image.linear_gradient("L"), text="<image>What?")


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def test_only_adapters_move_and_the_saved_model_keeps_them(tuned):
    before, after = unique_tensors(build(adapted()).model), weights(tuned)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name for name in before if ".encoders.1." in name and ".lora_B." in name} <= changed
    assert all(".lora_" in name or ".projector." in name for name in changed)
    assert not any(".encoders.0." in name for name in changed)
    model, processor = load(tuned)
    assert all(torch.equal(after[name], tensor) for name, tensor in unique_tensors(model).items())
    batch = shown(processor)
    said, logits = model.generate(**batch, max_new_tokens=3, do_sample=False), model(**batch).logits
    assert merge_adapters(model)
    # float32 through two layers: (W + s B A) x against W x + s B (A x).
    assert torch.allclose(model(**batch).logits, logits, atol=1e-5)
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), said)


def test_a_stopped_run_resumes_bit_for_bit(tuned, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(InterruptedRunError, match="--resume"):
            train(adapted(), out)
    train(adapted(), out, resume=True)
    assert told(out) == told(tuned)
    last = "1-tune-0000002"
    assert digest(out / "checkpoints" / last) == digest(tuned / "checkpoints" / last)
    other = adapted(adapters=[{**ADAPTERS[0], "rank": 3}, ADAPTERS[1]])
    with pytest.raises(CheckpointError, match=r"model\.adapters\.0\.rank: 2 -> 3"):
        train(other, out, resume=True)


KINDS = [
    {"match": ["encoders.1.*", "fusion.*"], "rank": 2, "dora": True},
    {
        "match": ["projector.*", "language_model.*"],
        "rank_share": 0.5,
        "scaling": "rank_stabilised",
        "dropout": 0.2,
        "quantise": "nf4",
    },
]


def test_every_kind_on_every_part_resumes_bit_for_bit_and_merges(tmp_path, monkeypatch):
    what = adapted(stage("tune", {"*lora_*": 1e-2}, synth("colour"), steps=2), adapters=KINDS)
    before = unique_tensors(build(what).model)
    for out in ("whole", "cut"):
        with monkeypatch.context() as patch:
            if out == "cut":
                stop_after(patch, 1)
                with pytest.raises(InterruptedRunError, match="--resume"):
                    train(what, tmp_path / out)
        train(what, tmp_path / out, resume=True)
    after = weights(tmp_path / "whole")
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (
        tmp_path / "cut/model/model.safetensors"
    ).read_bytes()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert all(".lora_" in name for name in changed)
    for part in ("encoders.1.", "fusion.", "projector.", "language_model."):
        assert any(name.startswith(f"model.{part}") and ".lora_B." in name for name in changed), part
    assert any("lora_magnitude_vector" in name for name in changed)
    assert {tensor.dtype for name, tensor in after.items() if name.endswith(".packed")} == {torch.uint8}
    words = ["convert", str(tmp_path / "whole"), str(tmp_path / "plain"), "--merge-adapters"]
    done = CliRunner().invoke(app, words)
    assert "adapted layers merged" in done.output
    (model, processor), (plain, _) = load(tmp_path / "whole"), load(tmp_path / "plain")
    assert plain.state_dict().keys() == build(recipe()).model.state_dict().keys()
    with torch.no_grad():  # products added up in another order, in float32
        torch.testing.assert_close(
            plain(**shown(processor)).logits, model(**shown(processor)).logits, atol=1e-4, rtol=0
        )


def test_4_bits_round_the_weights_that_were_loaded(tmp_path):
    source = build(recipe())
    source.model.model.language_model.save_pretrained(tmp_path / "words")
    source.processor.tokenizer.save_pretrained(tmp_path / "words")
    words = {"weights": str(tmp_path / "words")}
    packed = [{"match": ["language_model.*"], "rank": 2, "quantise": "nf4"}]
    model = build(adapted(language_model=words, tokenizer=words, adapters=packed)).model
    theirs = dict(source.model.model.language_model.named_modules())
    layers = [(n, m) for n, m in model.model.language_model.named_modules() if isinstance(m, AdaptedLinear)]
    assert len(layers) == 2 * 7
    for name, layer in layers:
        weight = theirs[name].weight.detach()
        assert torch.equal(layer.weight, dequantised(*quantised(weight), tuple(weight.shape)))


def test_adapters_come_after_experts_and_never_where_a_later_stage_puts_some():
    last = {"kind": "upcycle", "experts": {"layers": "all", "count": 2, "router": {"kind": "topk", "k": 1}}}
    names = {"*": 1e-3}
    now = adapted(stage("a", names, synth("colour"), steps=1), experts=[last["experts"]])
    model = build(now).model
    found = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    assert any("self_attn" in name for name in found)
    assert not any(".mlp." in name and "language_model" in name for name in found)
    assert model.config.experts
    assert model.config.adapters
    shapes = shape_only(recipe_config(now))
    assert shapes.state_dict().keys() == model.state_dict().keys()
    later = adapted(stage("a", names, synth("colour"), steps=1, before=[last]))
    with pytest.raises(PlanError, match="adapters are in"):
        stage_costs(later, recipe_config(later), images=1, text_tokens=8)
    beside = [{"match": ["language_model.*self_attn*"], "rank": 2}]
    later = adapted(stage("a", names, synth("colour"), steps=1, before=[last]), adapters=beside)
    assert stage_costs(later, recipe_config(later), images=1, text_tokens=8)


def test_the_plan_counts_what_trains():
    what = adapted()
    (cost,) = stage_costs(what, recipe_config(what), images=1, text_tokens=8)
    model = build(what).model
    trains = [p for name, p in model.named_parameters() if ".lora_" in name and ".encoders.0." not in name]
    assert cost.trainable == sum(p.numel() for p in [*trains, *model.model.projector.parameters()])


def test_adapters_train_in_a_solo_stage_too(tmp_path):
    solo = {"encoder": 1, "projector": {"kind": "pixel_shuffle"}}
    alone = {**TUNE, "solo": solo, "train": {"encoders.1.*lora_*": 1e-2, "projector.*": 1e-2}}
    before = unique_tensors(build(adapted()).model)
    train(adapted(alone), tmp_path / "run")
    after = weights(tmp_path / "run")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(".encoders.1." in name and ".lora_" in name for name in changed)


def test_published_weights_go_under_the_adapters(tmp_path):
    source = build(recipe())
    source.model.model.language_model.save_pretrained(tmp_path / "words")
    source.processor.tokenizer.save_pretrained(tmp_path / "words")
    source.model.model.encoders[0].tower.save_pretrained(tmp_path / "eye")
    words, eye = {"weights": str(tmp_path / "words")}, {"weights": str(tmp_path / "eye")}
    first, second = TINY["model"]["encoders"]
    model = build(adapted(language_model=words, tokenizer=words, encoders=[{**first, **eye}, second])).model
    theirs = unique_tensors(source.model)
    ours = {name.replace(".base_layer.", "."): tensor for name, tensor in unique_tensors(model).items()}
    kept = [name for name in theirs if name.startswith(("model.language_model.", "model.encoders.0."))]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    assert any(isinstance(module, AdaptedLinear) for module in model.model.language_model.modules())


def test_an_encoder_with_adapters_is_lent_merged(tuned, tmp_path):
    lent = [{"kind": "load_encoder", "encoder": 1, "weights": str(tuned), "from": 1}]
    frozen = stage("a", {"projector.*": 1e-3}, synth("colour"), steps=1, before=lent)
    train(recipe(stages=[frozen]), tmp_path / "plain")
    theirs, ours = load(tuned)[0], load(tmp_path / "plain")[0]
    merge_adapters(theirs)
    mine, lender = (each.model.encoders[1].state_dict() for each in (ours, theirs))
    assert mine.keys() == lender.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in lender.items())


@pytest.mark.parametrize("adapters", [ADAPTERS, [], [{"match": ["encoders.1.*"], "rank": 1}]])
def test_a_stage_may_start_from_a_model_with_other_adapters(tuned, tmp_path, adapters):
    last = stage("a", {"fusion.*": 1e-9}, synth("colour"), steps=1, start_from=str(tuned / "model"))
    kept = {"tokenizer": {"weights": str(tuned / "model")}, "adapters": adapters}
    train(adapted(last, **kept), tmp_path / "run")
    (ours, processor), theirs = load(tmp_path / "run"), load(tuned)[0]
    batch = shown(processor)
    # One step at a rate of 1e-9 apart; merging adds the rounding named above.
    assert torch.allclose(ours(**batch).logits, theirs(**batch).logits, atol=1e-5)
    assert len(ours.config.adapter_settings()) == len(adapters)


def test_the_command_line_merges_and_says_when_it_must(tuned, tmp_path):
    def command(*words):
        return CliRunner().invoke(app, ["convert", *map(str, words)])

    assert "adapted layers merged" in command(tuned, tmp_path / "plain", "--merge-adapters").output
    (model, processor), (plain, _) = load(tuned), load(tmp_path / "plain")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    with torch.no_grad():  # products added up in another order, in float32
        torch.testing.assert_close(
            plain(**shown(processor)).logits, model(**shown(processor)).logits, atol=1e-5, rtol=0
        )
    for words, said in (
        ((tmp_path / "plain", tmp_path / "x", "--merge-adapters"), "has no adapters"),
        ((tuned, tmp_path / "x", "--to", "llava", "--merge-adapters"), "cannot go with it"),
        ((tuned, tmp_path / "x", "--drop-encoder", "0"), "channel_concat|adapters"),
    ):
        found = command(*words)
        assert isinstance(found.exception, InputError)
        assert re.search(said, str(found.exception))
    assert not (tmp_path / "x").exists()
