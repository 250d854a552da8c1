"""A tiny recipe, trained for real: what a run leaves, and what changes nothing about it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import CONVNEXT, LANGUAGE, TINY, one_stage, recipe, stage, synth, told, train
from vlmix.core.errors import (
    RecipeError,
)
from vlmix.models.loading import load
from vlmix.train.build import build, recipe_config
from vlmix.train.checkpoint import unique_tensors

pytestmark = pytest.mark.flow


def test_a_run_leaves_a_model_metrics_curves_and_a_table(whole):
    out, text = whole
    model, processor = load(out)
    assert type(model).__name__ == "VlmixForConditionalGeneration"
    assert processor.image_seq_length == model.model.image_seq_length == 4
    assert model.generation_config.eos_token_id == processor.stop_token_ids
    last = load_file(out / "checkpoints" / "2-tune-0000003" / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in unique_tensors(model).items())
    assert "projector.*" in text
    assert "encoders.0.*" in text
    assert text.index("stage tune: what trains") < text.index("tune 3/3")
    assert "align: 12 rows read = 12 used + 0 quarantined" in text
    assert [row["global_step"] for row in told(out)] == [1, 2, 3, 4, 5, 6]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "2-tune-0000002",
        "2-tune-0000003",
    ]
    assert json.loads((out / "resolved.json").read_text())["stages"][0]["clip"] == 1.0
    assert "pickle" not in "".join(str(path) for path in out.rglob("*"))
    files = {path.suffix for path in out.rglob("*") if path.is_file() and path.parent.name != "tensorboard"}
    assert files <= {".json", ".jsonl", ".safetensors", ".yaml", ".png", ".jinja", ".lock"}


def test_stage_one_changes_only_the_projector(tmp_path):
    first = recipe(stages=[TINY["stages"][0]])
    before = {name: tensor.clone() for name, tensor in unique_tensors(build(first).model).items()}
    train(first, tmp_path / "run")
    after = load_file(tmp_path / "run" / "checkpoints" / "1-align-0000003" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("model.projector.") for name in changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages": [stage("a", {"projektor.*": 1e-3}, synth("colour"))]},
            r"'projektor\.\*'.*Near it: projector",
        ),
        (
            {"stages": [stage("a", {"*": 1e-3}, synth("colour", sise=3))]},
            r"stages\.0\.data\.0\.source\.sise.*'size'",
        ),
        (
            {"stages": [stage("a", {"*": 1e-3}, synth("colour"), before=[{"kind": "reinitialise"}])]},
            "parameters",
        ),
    ],
)
def test_a_wrong_recipe_writes_nothing(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message) as caught:
        train(recipe(**changes), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    # Answers of different lengths: averaging the micro-batches' own means would fail here. No dropout, since
    # its masks follow the micro-batches. Tolerance: float32 sums of about 1e3 terms in another order.
    quiet = {**LANGUAGE, "attention_dropout": 0.0}
    model = {**TINY["model"], "encoders": [TINY["model"]["encoders"][0], {**CONVNEXT, "drop_path": 0.0}]}
    results = []
    for size in (8, 1, 3):
        what = one_stage(
            synth("colour"), synth("caption"), batch_size=8, micro_batch_size=size, steps=2, clip=None
        ).model_copy(update={"model": recipe(model={**model, "language_model": quiet}).model})
        train(what, tmp_path / str(size))
        results.append(
            (told(tmp_path / str(size)), load_file(tmp_path / str(size) / "model" / "model.safetensors"))
        )
    for metrics, weights in results[1:]:
        for row, other in zip(metrics, results[0][0], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert row["supervised_tokens"] == other["supervised_tokens"]
        moved = max(float((weights[name] - tensor).abs().max()) for name, tensor in results[0][1].items())
        assert moved < 2e-4  # two updates of 1e-2 each
    assert len({row["supervised_tokens"] for row in results[0][0]}) > 1


def test_workers_checkpointing_and_precision_are_free_choices(tmp_path):
    plain = one_stage()
    train(plain, tmp_path / "plain")
    train(one_stage(workers=2), tmp_path / "workers")
    assert told(tmp_path / "plain") == told(tmp_path / "workers")
    train(one_stage(gradient_checkpointing=True), tmp_path / "recomputed")
    train(one_stage(precision="bf16"), tmp_path / "bf16")
    for name, tolerance in (("recomputed", 1e-5), ("bf16", 2e-2)):  # bf16 keeps 8 bits of each factor
        for row, other in zip(told(tmp_path / name), told(tmp_path / "plain"), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)


def test_the_planned_configuration_is_the_built_one():
    planned, built = recipe_config(recipe()), build(recipe()).model.config
    assert planned.image_seq_length == built.image_seq_length
    assert planned.language.vocab_size >= built.language.vocab_size
    assert (planned.encoders, planned.fusion, planned.projector) == (
        built.encoders,
        built.fusion,
        built.projector,
    )
