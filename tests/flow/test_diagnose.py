"""``vlmix diagnose`` on a trained mixture: one encoder counts, its twin sees the same, one is not read."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from tests.runs import LANGUAGE, recipe, stage, synth, train
from vlmix.cli.main import app
from vlmix.models.loading import load

pytestmark = pytest.mark.flow
CLIP = {"kind": "clip", "image_size": 48, "patch_size": 16, "width": 16, "layers": 1, "heads": 2, "mlp": 16}
CLIP["feature_layer"] = -1
EYES = ["0 clip", "1 clip", "2 clip"]
ASKED = [
    "-b",
    "synth_qa",
    "--limit",
    "16",
    "--set",
    "size=16",
    "--set",
    "image_size=48",
    "--set",
    "tasks=[existence,colour]",
]
JUDGED = {"kind": "synth_qa", "size": 20, "image_size": 48, "tasks": ["existence", "colour"]}
EVALS = [{"benchmark": JUDGED, "limit": 16}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and beside it the same model with other weights: twins 0 and 1, and 2 whose columns are zero."""
    out = tmp_path_factory.mktemp("diagnosed")
    model = {
        "image_size": 48,
        "encoders": [CLIP, CLIP, CLIP],
        "fusion": {"kind": "channel_concat", "norm": True, "encoder_dropout": 0.3},
        "projector": {"kind": "linear"},
        "language_model": {**LANGUAGE, "tie_word_embeddings": False},
        "tokenizer": {"train": {"vocab_size": 300, "samples": 20}},
        "chat_template": "chatml",
        "max_length": 128,
    }
    only = stage("only", {"*": 1e-2}, synth("existence"), steps=16, save_every_steps=16)
    train(recipe(model=model, stages=[only], evals=EVALS), out / "run")
    made, processor = load(out / "run")
    with torch.no_grad():
        made.model.encoders[1].load_state_dict(made.model.encoders[0].state_dict())
        made.model.projector.linear.weight[:, 32:] = 0
    made.save_pretrained(out / "edited")
    processor.save_pretrained(out / "edited")
    return out


def diagnose(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


def test_an_examination_from_model_to_page(trained, tmp_path):
    against = ["--subsets", "--against", trained / "run"]
    result = diagnose(trained / "edited", *ASKED, *against, "--out", tmp_path / "first")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "first" / "diagnostics.json").read_text())
    assert (found["encoders"], found["n"]) == (EYES, 16)
    told = found["findings"]
    assert told["utilisation"]["accuracy"] > 0
    dead = told["utilisation"]["u"]["2 clip"]
    assert dead["value"] == 0
    assert dead["low"] < 0 < dead["high"]
    assert sorted(told["utilisation"]["tasks"]) == ["colour", "existence"]
    likeness = told["similarity"]["cka"]
    assert likeness[0][1] == pytest.approx(1)
    assert likeness[0][0] == pytest.approx(1)
    assert likeness[0][2] == likeness[2][0] != pytest.approx(1)
    assert told["projector_blocks"]["2 clip"]["norm"] == told["projector_blocks"]["2 clip"]["adds"] == 0
    assert told["feature_maps"]["encoders"]["0 clip"] == told["feature_maps"]["encoders"]["1 clip"]
    mine, other = told["encoder_dropout"]["curves"]
    assert [curve["encoder_dropout"] for curve in (mine, other)] == [0.3, 0.3]
    assert [len(subset["kept"]) for subset in mine["subsets"]] == [0, 1, 1, 1, 2, 2, 2, 3]
    scores = {tuple(subset["kept"]): subset["score"] for subset in mine["subsets"]}
    assert scores[0, 1] == scores[0, 1, 2] == told["utilisation"]["accuracy"]
    assert mine["by_count"][3]["value"] == scores[0, 1, 2]
    assert set(found["skipped"]) == {"gates", "mining_windows"}
    page = (tmp_path / "first" / "diagnostics.html").read_text()
    assert "Masking is not retraining" in page
    assert "Masking is not retraining" in " ".join(result.stdout.split())
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    pictures = sorted(path.stem for path in (tmp_path / "first").glob("*.png"))
    assert pictures == ["encoder_dropout", "similarity", "utilisation"]
    assert page.count("data:image/png;base64,") == 3

    some = ["--only", "utilisation,similarity", "--batch-size", 3]
    again = diagnose(trained / "edited", *ASKED, *some, "--out", tmp_path / "second")
    assert again.exit_code == 0, again.output
    once_more = json.loads((tmp_path / "second" / "diagnostics.json").read_text())["findings"]
    assert once_more == {name: told[name] for name in ("utilisation", "similarity")}
    for name in ("utilisation.png", "similarity.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_run_is_asked_as_its_recipe_says_and_some_diagnostics_can_be_left_out(trained):
    result = diagnose(trained / "run", "-b", "synth_qa", "--only", "similarity,feature_maps")
    assert result.exit_code == 0, result.output
    found = json.loads((trained / "run" / "diagnosis-synth_qa" / "diagnostics.json").read_text())
    assert (found["n"], found["settings"]["tasks"]) == (16, ["existence", "colour"])
    assert (list(found["findings"]), found["skipped"]) == (["feature_maps", "similarity"], {})


def test_what_cannot_be_done_is_said_before_anything_is_written(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    edited, cases = trained / "edited", {}
    cases["no benchmark called"] = [edited, "-b", "synth"]
    cases["no diagnostic called"] = [edited, *ASKED, "--only", "likeness"]
    cases["give --subsets as well"] = [edited, *ASKED, "--against", edited]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"encoders": [{"kind": "clip"}]}')
    cases["of the same encoders alone"] = [edited, *ASKED, "--subsets", "--against", tmp_path / "other"]
    cases["no such folder"] = [tmp_path / "nowhere", *ASKED]
    cases["holds no diagnostics.json"] = [edited, *ASKED, "--out", tmp_path / "full"]
    for words, arguments in cases.items():
        result = diagnose(*arguments)
        assert result.exception is not None
        assert words in str(result.exception), words
        assert result.exception.exit_code == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (edited / "diagnosis-synth_qa").exists()
