"""Stages that train one encoder alone: what they run and leave, resumed anywhere, used elsewhere."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.flow.test_resume import stop_after
from tests.runs import CONVNEXT, TINY, digest, recipe, stage, synth, told, train
from vlmix.core.errors import InputError, InterruptedRunError, PlanError, RecipeError
from vlmix.models.configuration import VlmixConfig
from vlmix.models.flops import flop_counter
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import forward_loss, parameter_count, shape_only, training_bytes
from vlmix.train.build import build, open_source, recipe_config
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.costs import stage_costs
from vlmix.train.reading import SampleEncoder
from vlmix.train.recipe_file import check_kinds
from vlmix.train.solo import running
from vlmix.train.trainable import select

pytestmark = pytest.mark.flow

SHUFFLE = {"kind": "pixel_shuffle"}
ALIGN = [
    stage(
        "align_siglip",
        {"encoders.0.*": 1e-3, "projector.*": 1e-2},
        synth("caption"),
        solo={"encoder": 0, "projector": {"kind": "linear"}},
        steps=2,
    ),
    stage(
        "align_convnext",
        {"encoders.1.*": 1e-3, "projector.*": 1e-2, "language_model.*norm*": 1e-3},
        synth("colour"),
        solo={"encoder": 1, "projector": SHUFFLE},
        steps=2,
    ),
]
JOIN = stage("join", {"*": 1e-3}, synth("caption"), steps=1)


def solo(*stages):
    return recipe(stages=list(stages or (*ALIGN, JOIN)))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("aligned") / "run"
    return out, train(solo(), out)


def test_a_solo_stage_changes_what_it_trains_and_leaves_the_rest(tmp_path):
    what = solo(ALIGN[1])
    before = {name: tensor.clone() for name, tensor in unique_tensors(build(what).model).items()}
    text = train(what, tmp_path / "run")
    assert "stage align_convnext: what trains" in text
    kept = load_file(tmp_path / "run" / "checkpoints" / "1-align_convnext-0000002" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    own = {name for name in kept if not name.startswith("model.")}
    assert {name.partition(".")[0] for name in own} == {"solo_projector"}
    assert after.keys() == before.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[1] for name in changed} == {"encoders", "language_model"}
    assert all(name.startswith("model.encoders.1.") or "norm" in name for name in changed)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_run_stopped_in_or_after_a_solo_stage_resumes_bit_for_bit(aligned, tmp_path, monkeypatch, steps):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(InterruptedRunError, match="--resume"):
            train(solo(), out)
    assert "resuming stage align_" in train(solo(), out, resume=True)
    assert told(out) == told(aligned[0])
    for name in ("2-align_convnext-0000002", "3-join-0000001"):
        assert digest(out / "checkpoints" / name) == digest(aligned[0] / "checkpoints" / name)
    last = "model/model.safetensors"
    assert (out / last).read_bytes() == (aligned[0] / last).read_bytes()


def test_the_solo_model_is_a_model_of_that_encoder_alone():
    what = solo()
    setup = build(what)
    ran = running(setup, what.stages[1], (0, 1))
    alone = VlmixForConditionalGeneration(one_encoder(setup.model.config)).eval()
    tensors = {name.replace("encoders.1.", "encoders.0."): t for name, t in ran.model.state_dict().items()}
    alone.load_state_dict(tensors)
    assert ran.processor.image_seq_length == alone.model.image_seq_length == 36
    assert setup.processor.image_seq_length == setup.model.model.image_seq_length == 4
    source = synth("colour")["source"]
    encoder = SampleEncoder(ran.processor)
    encoded = [encoder.encode(open_source(source)[row]) for row in (0, 1)]
    batch = encoder.collate(encoded, [encoder.open(each) for each in encoded])
    assert torch.equal(ran.model.eval()(**batch).logits, alone(**batch).logits)
    assert ran.model.model.language_model is setup.model.model.language_model
    assert ran.model.model.encoders[1] is setup.model.model.encoders[1]


def test_a_solo_projector_depends_on_seed_and_stage_alone():
    what = solo()
    setup = build(what)
    state = torch.get_rng_state()

    def drawn(index, seed):
        model = running(setup, what.stages[index], seed).model
        return torch.cat([p.flatten() for p in model.model.projector.parameters()])

    first = drawn(1, (0, 1))
    assert first.isfinite().all()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(first, drawn(1, (0, 1)))
    assert not torch.equal(first, drawn(1, (0, 0)))
    assert not torch.equal(first, drawn(1, (1, 1)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"solo": {"encoder": 2, "projector": SHUFFLE}}, RecipeError, r"stages\.0\.solo\.encoder.*are 2"),
        (
            {"solo": {"encoder": 0, "projector": {"kind": "mlp", "dept": 2}}},
            RecipeError,
            r"solo\.projector\.dept.*'depth'",
        ),
        (
            {"solo": {"encoder": 1, "projector": {**SHUFFLE, "factor": 5}}},
            PlanError,
            r"stage align_convnext, solo: pixel_shuffle",
        ),
        (
            {"train": {"encoders.0.*": 1e-3}},
            RecipeError,
            r"'encoders\.0\.\*' matches no.*has encoder 1 alone",
        ),
        ({"train": {"fusion.*": 1e-3}}, RecipeError, r"'fusion\.\*' matches no.*has encoder 1 alone"),
    ],
)
def test_a_wrong_solo_stage_writes_nothing(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(solo({**ALIGN[1], **changes}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_solo_projector_of_no_known_kind_is_refused():
    wrong = solo({**ALIGN[1], "solo": {"encoder": 0, "projector": {"kind": "mpl"}}})
    with pytest.raises(RecipeError, match=r"stages\.0\.solo\.projector: .*'mlp'"):
        check_kinds(wrong)


def test_a_solo_stage_is_planned_as_the_model_it_runs():
    what = solo()
    config = recipe_config(what)
    costs = stage_costs(what, config, images=2, text_tokens=8)
    assert [cost.visual_tokens for cost in costs] == [4, 36, 4]
    alone = shape_only(one_encoder(config), torch.float32).train()
    select(alone, {name.replace("encoders.1", "encoders.0"): 1.0 for name in ALIGN[1]["train"]})
    assert costs[1].activation_bytes == training_bytes(alone, rows=4, images=2, text_tokens=8)
    with flop_counter() as counter:
        forward_loss(alone, rows=1, images=2, text_tokens=8).backward()
    assert costs[1].flops_per_sample == counter.get_total_flops()
    assert costs[1].trainable == sum(p.numel() for p in alone.parameters() if p.requires_grad)
    held = parameter_count(shape_only(config)) + parameter_count(alone.model.projector)
    assert costs[1].weight_bytes == 4 * held


def test_solo_stages_see_pictures_as_the_model_does(tmp_path):
    model = {**TINY["model"], "views": {"kind": "anyres", "canvases": [[1, 2], [2, 1]]}, "max_length": 400}
    cheap = {"precision": "bf16", "gradient_checkpointing": True}
    tiled = recipe(
        model=model, stages=[{**ALIGN[1], **cheap, "train": {"views.*": 1e-2, "projector.*": 1e-2}}]
    )
    train(tiled, tmp_path / "run")
    before = unique_tensors(build(tiled).model)
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.views.newline"]


def test_an_aligned_encoder_serves_another_mixture(aligned, tmp_path):
    folder = aligned[0]
    swapped = {**TINY["model"], "encoders": [{**CONVNEXT, "drop_path": 0.0}], "fusion": {"kind": "single"}}
    swapped = {**swapped, "projector": SHUFFLE}

    def mixture(weights, encoder=0, number=1, model=swapped):
        loading = {"kind": "load_encoder", "encoder": encoder, "weights": str(weights), "from": number}
        frozen = stage("a", {"projector.*": 1e-3}, synth("caption"), steps=1, before=[loading])
        return recipe(model=model, stages=[frozen])

    def same(out, theirs):
        ours = load_file(out / "model" / "model.safetensors")
        pairs = {
            name: theirs[name.replace("encoders.0.", "encoders.1.")]
            for name in ours
            if ".encoders.0." in name
        }
        return len(pairs) > 10 and all(torch.equal(ours[name], tensor) for name, tensor in pairs.items())

    assert f"encoder 0: encoder 1 of {folder}" in train(mixture(folder), tmp_path / "run")
    assert same(tmp_path / "run", load_file(folder / "model" / "model.safetensors"))
    train(mixture(folder / "model"), tmp_path / "model")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder, unfinished)
    shutil.rmtree(unfinished / "model")
    shutil.rmtree(unfinished / "checkpoints" / "3-join-0000001")
    train(mixture(unfinished), tmp_path / "early")
    aside = unfinished / "checkpoints" / "2-align_convnext-0000002" / "model.safetensors"
    assert same(tmp_path / "early", load_file(aside))

    other = {**swapped, "encoders": [{**CONVNEXT, "depths": [1, 2, 1, 1]}]}
    large = {**swapped, "encoders": [{**TINY["model"]["encoders"][0], "image_size": 96}]}
    wrong = (
        (folder, {"number": 2}, "no encoder 2; it has 2"),
        (folder, {"number": 0}, "kind is 'siglip', here 'convnext'"),
        (folder, {"model": other}, r"encoder 1 is another: depths is"),
        (
            folder,
            {"model": large, "number": 0},
            r"does not fit: .*position_embedding.*\(4, 8\), here \(16, 8\)",
        ),
        (tmp_path, {}, "no model or run folder of vlmix"),
        (folder, {"number": None}, "from: NUMBER"),
        (folder, {"encoder": 1}, "encoder 1: the model has 1"),
    )
    for number, (weights, more, message) in enumerate(wrong):
        with pytest.raises(InputError, match=message):
            train(mixture(weights, **more), tmp_path / "wrong" / str(number))


def one_encoder(config):
    return VlmixConfig(
        text_config=config.language.to_dict(),
        encoders=[CONVNEXT],
        fusion={"kind": "single"},
        projector=SHUFFLE,
        image_size=48,
        image_token_id=config.image_token_id,
    )
