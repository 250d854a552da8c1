"""The command line as a user meets it: a tiny run from recipe to answer, and what mistakes lead to."""

import json

import pytest
import yaml
from PIL import Image

from tests.commands import vlmix

pytestmark = pytest.mark.flow
STAGE = {
    "train": {"*": 1e-3},
    "data": [{"source": {"kind": "synth", "size": 64, "image_size": 48, "tasks": ["colour", "count"]}}],
    "batch_size": 4,
    "steps": 2,
}
RECIPE = {
    "name": "tiny",
    "model": {
        "image_size": 48,
        "encoders": [
            {
                "kind": "clip",
                "image_size": 16,
                "patch_size": 8,
                "width": 16,
                "layers": 2,
                "heads": 2,
                "mlp": 16,
            },
            {"kind": "convnext", "image_size": 48, "depths": [1] * 4, "widths": [8] * 4, "stages": [0, 1]},
        ],
        "fusion": {"kind": "patch_mining"},
        "projector": {"kind": "mlp"},
        "language_model": {
            "model_type": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 128,
        },
        "tokenizer": {"train": {"vocab_size": 320, "samples": 64}},
        "chat_template": "mistral",
        "max_length": 128,
    },
    "stages": [{"name": "one", **STAGE}, {"name": "two", **STAGE}],
    "evals": [{"benchmark": {"kind": "synth_qa", "size": 8, "image_size": 48, "tasks": ["colour", "count"]}}],
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    trained = vlmix("train", "tiny.yaml", "--out", "run", cwd=folder, check=0, installed=True)
    assert "encoders" in trained.stderr or "*" in trained.stderr
    assert {p.name for p in (folder / "run").iterdir()} >= {"model", "report", "metrics.jsonl", "curves.png"}
    Image.new("RGB", (70, 50), (200, 30, 30)).save(folder / "red.png")
    return folder


def test_a_finished_run_answers_is_judged_and_planned(run_folder):
    answer = vlmix("chat", "run", "What colour is it?", "--image", "red.png", cwd=run_folder, check=0)
    assert len(answer.stdout.splitlines()) == 1
    judged = vlmix(
        "eval", "run", "-b", "synth_qa", "--out", "judged", "--set", "image_size=48", "--set", "size=6",
        "--limit", 4, cwd=run_folder, check=0,
    )  # fmt: skip
    assert "accuracy" in judged.stdout
    results = json.loads((run_folder / "judged/results.json").read_text(encoding="utf-8"))
    assert results["results"][0]["n"] == 4
    assert results["results"][0]["settings"]["tasks"] == ["colour", "count"], "those of the run's recipe"
    planned = [
        json.loads(vlmix("plan", x, "--json", cwd=run_folder, check=0).stdout) for x in ("run", "tiny.yaml")
    ]
    assert planned[0]["tokens_per_image"] == planned[1]["tokens_per_image"] == 4
    assert [stage["steps"] for stage in planned[1]["stages"]] == [2, 2]
    assert "one" in vlmix("plan", "tiny.yaml", cwd=run_folder, check=0).stdout


def test_a_run_is_judged_as_its_recipe_says_unless_told_otherwise(run_folder):
    def settings(*arguments):
        out = f"judged{len(list(run_folder.iterdir()))}"
        run = vlmix("eval", *arguments, "--out", out, cwd=run_folder, check=0)
        return run, json.loads((run_folder / out / "results.json").read_text("utf-8"))["results"][0]

    run, found = settings("run")
    own = RECIPE["evals"][0]["benchmark"]
    assert {key: found["settings"][key] for key in own} == own
    assert found["n"] == own["size"]
    assert "as in run/recipe.yaml: synth_qa image_size=48 size=8 tasks=" in run.stderr
    _, changed = settings("run", "-b", "synth_qa", "--set", "seed=3", "--limit", "2")
    assert changed["settings"] == {**found["settings"], "seed": 3}
    assert changed["n"] == 2
    _, bare = settings("run/model", "-b", "synth_qa", "--limit", "2", "--set", "image_size=48")
    assert len(bare["settings"]["tasks"]) > 2, "a model folder has no recipe"
    refused = vlmix("eval", "run/model", cwd=run_folder, check=2)
    assert "--benchmark, one of" in refused.stderr


def test_a_dress_rehearsal_needs_neither_weights_nor_data(tmp_path):
    rehearsed = vlmix("train", "eagle/x2_7b", "stages.1=null", "--tiny", cwd=tmp_path, check=0)
    assert "dress rehearsal" in rehearsed.stderr
    assert (tmp_path / "runs/eagle_x2_7b_tiny/model/config.json").is_file()


def test_training_again_needs_a_word(run_folder):
    again = vlmix("train", "tiny.yaml", "--out", "run", cwd=run_folder, check=2)
    assert "--resume" in again.stderr
    vlmix("train", "tiny.yaml", "--out", "run", "--resume", cwd=run_folder, check=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian", "tiny.yaml"], "No such command"),
        (["train", "tiny.yaml", "--reusme"], "--resume"),
        (["train", "tinny.yaml"], "tinny.yaml"),
        (["train", "dmo"], "demo"),
        (["train", "tiny.yaml", "stages.0.stesp=3"], "steps"),
        (["train", "tiny.yaml", "model.encoders.0.kind=clp"], "clip"),
        (["train", "tiny.yaml", "model.encoders.0.pach_size=8"], "patch_size"),
        (["train", "tiny.yaml", "model.encoders.0.patch_size=7"], "multiple"),
        (["train", "tiny.yaml", "stages.0.batch_size=-1"], "batch_size"),
        (["train", "tiny.yaml", "stages.1.train={encodres.*: 0.001}"], "encoders"),
        (["list", "encodres"], "encoders"),
        (["eval", "run", "-b", "synth_q"], "synth_qa"),
        (["eval", "nowhere", "-b", "synth_qa"], "no such folder"),
        (["eval", "run", "-b", "nlvr", "--data", "nowhere"], "no such folder"),
        (["chat", "run", "--image", "missing.png", "What?"], "missing.png"),
        (["chat", "run", "--image", "tiny.yaml", "What?"], "tiny.yaml"),
        (["chat", "run"], "no question"),
        (["plan", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_named_with_its_remedy_and_writes_nothing(run_folder, arguments, says):
    before = sorted(run_folder.iterdir())
    if arguments[0] == "train":
        arguments = [*arguments, "--out", "new"]
    run = vlmix(*arguments, cwd=run_folder, check=2)
    assert says in run.stderr
    assert sorted(run_folder.iterdir()) == before


def test_help_list_and_doctor_speak(tmp_path):
    for command in ([], ["list"], ["plan"], ["train"], ["eval"], ["chat"], ["demo"], ["doctor"]):
        assert "Usage" in vlmix(*command, "--help", cwd=tmp_path, check=0).stdout
    listed = vlmix("list", cwd=tmp_path, check=0).stdout
    assert all(word in listed for word in ("clip", "patch_mining", "mlp", "llava_json", "nlvr", "demo"))
    assert "torch" in vlmix("doctor", cwd=tmp_path, check=0, installed=True).stdout
    assert vlmix("--version", cwd=tmp_path, check=0, installed=True).stdout.startswith("vlmix ")
