"""A run with packed rows and a fused loss is the run without, step by step; some rows are text alone."""

import json

import pytest

from tests.runs import CONVNEXT, LANGUAGE, TINY, recipe, stage, synth, told, train

pytestmark = pytest.mark.flow
# float32 sums in another order; through two updates at a rate of 1e-2.
NEAR = 1e-5


def still(words, **more):
    """Nothing random in the model: what runs together must not matter."""
    model = {
        **TINY["model"],
        "encoders": [TINY["model"]["encoders"][0], {**CONVNEXT, "drop_path": 0.0}],
        "language_model": {**LANGUAGE, "attention_dropout": 0.0},
    }
    data = [synth("caption"), {"source": {"kind": "llava_json", "path": str(words)}}]
    # The usual eps would make a full step of the rounding in gradients near 0.
    given = {"batch_size": 6, "optimizer": {"eps": 1e-3}, **more}
    return recipe(model=model, stages=[stage("only", {"*": 1e-2}, *data, **given)])


@pytest.fixture
def words(tmp_path):
    talk = [{"from": "human", "value": "say"}, {"from": "gpt", "value": "red blue"}]
    rows = [
        {"id": str(n), "conversations": [talk[0], {**talk[1], "value": "red " * (n + 1)}]} for n in range(9)
    ]
    (tmp_path / "words.json").write_text(json.dumps(rows))
    return tmp_path / "words.json"


def test_packed_rows_and_a_fused_loss_train_alike(words, tmp_path):
    train(still(words, micro_batch_size=2), tmp_path / "padded")
    padded = told(tmp_path / "padded")
    packed = {"batching": {"pack": True, "tokens": 128}}
    for name, more in {
        "packed": packed,
        "fused": {"fused_loss": True},
        "both": {**packed, "fused_loss": True},
    }.items():
        train(still(words, workers=1, **more), tmp_path / name)
        rows = told(tmp_path / name)
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in padded]
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in padded], rel=NEAR)
        if "pack" in more.get("batching", {}):
            assert all(row["positions"] == row["tokens"] for row in rows)
    assert sum(row["positions"] for row in padded) > sum(row["tokens"] for row in padded)


def test_eight_at_once_are_eight_one_by_one(words, tmp_path):
    for size in (8, 1):
        train(still(words, batch_size=8, micro_batch_size=size), tmp_path / str(size))
    once, each = told(tmp_path / "8"), told(tmp_path / "1")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in each] == pytest.approx([row[key] for row in once], rel=NEAR)
    assert [row["samples"] for row in each] == [8, 8, 8]
