"""A tiny recipe, trained for real: resume, accumulation, faults, locks and the folder it leaves."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import threading

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlmix.core.errors import (
    CheckpointError,
    DataError,
    DiskFullError,
    InputError,
    InterruptedRunError,
    NonFiniteError,
    RecipeError,
    RunLockedError,
)
from vlmix.core.files import run_lock, verify_manifest, write_manifest
from vlmix.core.settings import read_settings
from vlmix.data.sources.synth import Synth
from vlmix.models.loading import load
from vlmix.train import checkpoint, stages
from vlmix.train.build import build, load_setup, recipe_config
from vlmix.train.checkpoint import SCHEMA, newest, unique_tensors
from vlmix.train.recipe import Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe

pytestmark = pytest.mark.flow


def synth(*tasks, **more):
    return {"source": {"kind": "synth", "size": 20, "image_size": 48, "tasks": list(tasks), **more}}


def stage(name, train, *data, **more):
    rest = {"batch_size": 4, "steps": 3, "save_every_steps": 1, **more}
    return {"name": name, "train": train, "data": list(data), **rest}


LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "attention_dropout": 0.2,
    "tie_word_embeddings": True,
}
CONVNEXT = {
    "kind": "convnext",
    "image_size": 48,
    "depths": [1, 1, 1, 1],
    "widths": [4, 6, 8, 10],
    "stages": [0, 1],
    "layer_scale": 1.0,
    "drop_path": 0.5,
}
TINY = {
    "name": "tiny",
    "model": {
        "image_size": 48,
        "encoders": [
            {
                "kind": "siglip",
                "image_size": 48,
                "patch_size": 24,
                "width": 8,
                "layers": 1,
                "heads": 2,
                "mlp": 16,
            },
            CONVNEXT,
        ],
        "fusion": {"kind": "patch_mining"},
        "projector": {"kind": "linear"},
        "language_model": LANGUAGE,
        "tokenizer": {"train": {"vocab_size": 300, "samples": 4}},
        "chat_template": "chatml",
        "max_length": 128,
    },
    "stages": [
        stage("align", {"projector.*": 1e-2}, synth("caption")),
        stage(
            "tune",
            {"*": 1e-2, "encoders.0.*": 1e-3},
            {**synth("colour"), "weight": 2},
            {**synth("text_digits"), "weight": 1},
            micro_batch_size=3,
            before=[{"kind": "reinitialise", "parameters": ["projector.*"]}],
            optimizer={"weight_decay": 0.1},
        ),
    ],
}


def recipe(**changes):
    return read_settings(Recipe, {**TINY, **changes})


def one_stage(*data, **more):
    only = stage("only", {"*": 1e-2}, *(data or [synth("colour")]))
    return recipe(stages=[{**only, **more}])


def train(what, out, resume=False):
    text = io.StringIO()
    run_recipe(what, out, resume=resume, console=Console(file=text, width=200))
    return text.getvalue()


def digest(folder):
    """Everything a checkpoint holds that decides the rest of the run."""
    names = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def told(out):
    """The metrics without the two clocks."""
    return [
        {k: v for k, v in row.items() if not k.endswith("seconds")}
        for row in read_metrics(out / "metrics.jsonl")
    ]


def stop_after(monkeypatch, steps):
    """Ask for a stop, as Ctrl-C does, when ``steps`` steps of the run are done."""
    seen = 0
    real = stages.StageLoop._record

    def record(self, *args):
        nonlocal seen
        seen += 1
        if seen == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(stages.StageLoop, "_record", record)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(recipe(), out)


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
    files = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert files <= {".json", ".jsonl", ".safetensors", ".yaml", ".png", ".jinja", ".lock", ".0", ".1"}


def test_stage_one_changes_only_the_projector(tmp_path):
    first = recipe(stages=[TINY["stages"][0]])
    before = {name: tensor.clone() for name, tensor in unique_tensors(build(first).model).items()}
    train(first, tmp_path / "run")
    after = load_file(tmp_path / "run" / "checkpoints" / "1-align-0000003" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("model.projector.") for name in changed)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path, monkeypatch, steps):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(InterruptedRunError, match="--resume") as caught:
            train(recipe(), out)
    assert caught.value.exit_code == 130
    assert len(told(out)) == steps
    assert not (out / "model").exists()
    text = train(recipe(), out, resume=True)
    assert "resuming stage" in text
    for name in ("2-tune-0000002", "2-tune-0000003"):
        if steps < 6 or name.endswith("3"):
            assert digest(out / "checkpoints" / name) == digest(whole[0] / "checkpoints" / name)
    assert told(out) == told(whole[0])
    assert (out / "model" / "model.safetensors").read_bytes() == (
        whole[0] / "model" / "model.safetensors"
    ).read_bytes()


def test_a_run_killed_between_checkpoints_repeats_what_was_lost(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "2-tune-0000003")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tune", "st')
    train(recipe(), out, resume=True)
    assert told(out) == told(whole[0])
    assert digest(out / "checkpoints" / "2-tune-0000003") == digest(
        whole[0] / "checkpoints" / "2-tune-0000003"
    )


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    weights = out / "checkpoints" / "2-tune-0000003" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    text = train(recipe(), out, resume=True)
    assert "was changed or damaged" in text
    assert "going on from 2-tune-0000002" in text
    assert digest(out / "checkpoints" / "2-tune-0000003") == digest(
        whole[0] / "checkpoints" / "2-tune-0000003"
    )
    for folder in (out / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(recipe(), out, resume=True)


def test_resuming_with_another_recipe_or_other_data_names_the_difference(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    changed = [TINY["stages"][0], {**TINY["stages"][1], "batch_size": 5}]
    with pytest.raises(CheckpointError, match=r"stages\.1\.batch_size: 4 -> 5"):
        train(recipe(stages=changed), out, resume=True)
    swapped = {**TINY["stages"][1], "train": {"encoders.0.*": 1e-3, "*": 1e-2}}
    with pytest.raises(CheckpointError, match=r"stages\.1\.train \(order\)"):
        train(recipe(stages=[TINY["stages"][0], swapped]), out, resume=True)
    free = [{**each, "workers": 2, "save_every_steps": None} for each in TINY["stages"]]
    train(recipe(stages=free, evals=[{"benchmark": {"kind": "synth_qa"}}]), out, resume=True)
    state = out / "checkpoints" / "2-tune-0000003" / "state.json"
    state.write_text(state.read_text().replace('"order": "', '"order": "0'))
    write_manifest(state.parent, SCHEMA)
    with pytest.raises(CheckpointError, match="the data of stage tune changed"):
        train(recipe(), out, resume=True)


def test_a_folder_in_use_or_not_empty_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match="--resume"):
        train(recipe(), whole[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a run"):
        train(recipe(), tmp_path / "other", resume=True)
    errors = []

    def second():
        try:
            train(recipe(), tmp_path / "run")
        except RunLockedError as error:
            errors.append(error)

    with run_lock(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert [error.exit_code for error in errors] == [5]
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("where", ["weight", "gradient", "loss"])
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch, where):
    seen = []
    real = stages.StageLoop._backward

    def poisoned(self, batch, supervised_tokens):
        loss = real(self, batch, supervised_tokens)
        parameters = self.selection.parameters
        if len(seen) == 1:
            before.update({name: p.detach().clone() for name, p in parameters.items()})
            if where == "weight":
                with torch.no_grad():
                    parameters["projector.linear.weight"].view(-1)[0] = torch.inf
                before["projector.linear.weight"].view(-1)[0] = torch.inf
                loss = real(self, batch, supervised_tokens)
            elif where == "gradient":
                parameters["projector.linear.bias"].grad.view(-1)[0] = torch.nan
            else:
                loss = loss * torch.nan
        seen.append(parameters)
        return loss

    before = {}
    monkeypatch.setattr(stages.StageLoop, "_backward", poisoned)
    with pytest.raises(NonFiniteError, match=f"stage only, step 2: the {where}.*not changed") as caught:
        train(one_stage(), tmp_path / "run")
    assert caught.value.exit_code == 3
    assert all(torch.equal(before[name], p.detach()) for name, p in seen[-1].items())
    dump = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert dump["step"] == 2
    assert len(dump["samples"]) == 4
    assert all(sample in str(caught.value) for sample in dump["samples"])
    assert len(told(tmp_path / "run")) == 1
    monkeypatch.undo()
    train(one_stage(), tmp_path / "again")
    train(one_stage(), tmp_path / "run", resume=True)
    assert told(tmp_path / "run") == told(tmp_path / "again")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    saved = 0

    def full(tensors, path):
        nonlocal saved
        saved += 1
        save_file(tensors, path)
        if saved == 5:  # the optimizer of the second checkpoint, after its weights
            path.write_bytes(path.read_bytes()[:100])
            if isinstance(error, OSError):
                raise error
            raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(DiskFullError, match="intact") as caught:
            train(one_stage(), tmp_path / "run")
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1-only-0000001"]
    assert newest(tmp_path / "run" / "checkpoints").state.step == 1
    train(one_stage(), tmp_path / "run", resume=True)
    train(one_stage(), tmp_path / "whole")
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def bad_rows(tmp_path, count, bad):
    """A LLaVA file of ``count`` rows of which the first ``bad`` name a missing picture."""
    sample = Synth(Synth.settings_class(size=1, image_size=48, tasks=("colour",)))[0]
    sample.images[0].open().save(tmp_path / "good.png")
    rows = [
        {
            "id": f"row{i}",
            "image": "missing.png" if i < bad else "good.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": "red" * (1 + i % 3)},
            ],
        }
        for i in range(count)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {"source": {"kind": "llava_json", "path": str(tmp_path / "rows.json"), "images": str(tmp_path)}}


def test_bad_rows_are_counted_and_never_replaced(tmp_path):
    what = one_stage(bad_rows(tmp_path, 20, 3), epochs=2, steps=None, max_bad=0.5)
    text = train(what, tmp_path / "run")
    assert "40 rows read = 34 used + 6 quarantined" in text
    assert sum(row["samples"] for row in told(tmp_path / "run")) == 34
    assert sum(row["quarantined"] for row in told(tmp_path / "run")) == 6
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["id"].partition("#")[0] for row in listed) == ["row0", "row1", "row2"]
    assert all("missing.png" in row["reason"] and row["line"] for row in listed)
    with pytest.raises(DataError, match="max_bad"):
        train(one_stage(bad_rows(tmp_path, 20, 18), epochs=1, steps=None), tmp_path / "too many")


def test_a_step_without_a_good_row_changes_nothing(tmp_path):
    what = one_stage(bad_rows(tmp_path, 8, 8), max_bad=1.0)
    train(what, tmp_path / "run")
    before = unique_tensors(build(what).model)
    after = load_file(tmp_path / "run" / "checkpoints" / "1-only-0000003" / "model.safetensors")
    assert all(row["loss"] is None for row in told(tmp_path / "run"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


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


def test_a_run_stopped_before_its_first_checkpoint_begins_again(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints")
    train(recipe(), out, resume=True)
    assert told(out) == told(whole[0])
    verify_manifest(out / "model")
    setup = load_setup(out / "setup", 0)
    first = unique_tensors(build(recipe()).model)
    assert all(torch.equal(first[name], tensor) for name, tensor in unique_tensors(setup.model).items())


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


def test_the_planned_configuration_is_the_built_one():
    planned, built = recipe_config(recipe()), build(recipe()).model.config
    assert planned.image_seq_length == built.image_seq_length
    assert planned.language.vocab_size >= built.language.vocab_size
    assert (planned.encoders, planned.fusion, planned.projector) == (
        built.encoders,
        built.fusion,
        built.projector,
    )
