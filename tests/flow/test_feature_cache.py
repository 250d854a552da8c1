"""Features computed once: a run with the cache is the run without, whatever happens to it or the folder."""

import shutil

import pytest

from tests.flow.test_resume import stop_after
from tests.runs import TINY, digest, one_stage, recipe, stage, synth, told, train
from vlmix.core.errors import InterruptedRunError, RecipeError
from vlmix.models import looking
from vlmix.train import feature_store
from vlmix.train.feature_cache import FOLDER

pytestmark = pytest.mark.flow

SIGLIP = TINY["model"]["encoders"][0]
ALIGN = stage("align", {"projector.*": 1e-2}, synth("caption", size=8), steps=6, batch_size=4)
TUNE = stage("tune", {"projector.*": 1e-3, "language_model.*": 1e-3}, synth("caption", size=8), steps=3)


def two_stages(cache=None, **changes):
    stages = [{**each, **changes} for each in (ALIGN, TUNE)]
    return recipe(stages=stages, feature_cache=cache or {})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    text = train(two_stages(cache_features=False), out)
    assert "features:" not in text
    return out


def same(out, plain):
    assert told(out) == told(plain)
    assert digest(out / "checkpoints" / "2-tune-0000003") == digest(plain / "checkpoints" / "2-tune-0000003")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_the_cache_is_the_run_without(plain, tmp_path, workers):
    text = train(two_stages(workers=workers), tmp_path / "run")
    same(tmp_path / "run", plain)
    # Without workers each of the 8 pictures is computed once; they look ahead of what is stored.
    if not workers:
        assert "align: features: 16 of 24 pictures" in text
    assert "tune: features: 12 of 12 pictures" in text
    assert not (tmp_path / "run" / FOLDER).exists()


def test_a_stopped_run_goes_on_with_what_it_has(plain, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(InterruptedRunError):
            train(two_stages(), out)
    assert any((out / FOLDER).rglob("*.safetensors"))
    assert "align: features: 12 of 12" in train(two_stages(), out, resume=True)
    same(out, plain)


def test_a_folder_serves_other_runs_mixtures_and_damage_is_repaired(plain, tmp_path):
    cache = {"folder": str(tmp_path / "kept")}
    train(two_stages(cache), tmp_path / "first")
    again = two_stages(cache)
    assert "align: features: 24 of 24" in train(again, tmp_path / "second")
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(files) == 16  # two encoders, eight pictures
    files[0].write_bytes(files[0].read_bytes()[:-5])
    files[1].write_bytes(b"not ours")
    shutil.copy(files[2], files[3])
    content = bytearray(files[4].read_bytes())
    content[-1] ^= 1
    files[4].write_bytes(content)
    train(again, tmp_path / "third")
    assert "align: features: 24 of 24" in train(again, tmp_path / "fourth")  # what was damaged is whole again
    for name in ("first", "second", "third", "fourth"):
        same(tmp_path / name, plain)
    other = {**TINY["model"], "encoders": [SIGLIP], "fusion": {"kind": "single"}}
    text = train(recipe(model=other, stages=[ALIGN], feature_cache=cache), tmp_path / "other")
    assert "24 of 24" in text


def test_a_full_disk_ends_storing_and_not_the_run(plain, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.Path, "write_bytes", full)
    text = train(two_stages(), tmp_path / "run")
    assert text.count("takes no more (No space left on device)") == 2  # once a stage
    same(tmp_path / "run", plain)


def test_stages_that_cannot_keep_features_say_so_or_do_without(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"stages\.0\.cache_features: .* because encoder 0 is trained"):
        train(one_stage(cache_features=True), tmp_path / "trained")
    assert not (tmp_path / "trained").exists()
    trained = [{**ALIGN, "train": {"*": 1e-3}}]
    text = train(recipe(stages=trained), tmp_path / "left")
    assert "features: stage align runs its encoders in every step, because encoder 0 is trained" in text
    for off in ({"use": False}, None):
        quiet = {} if off else {"cache_features": False}
        stages = [{**each, **quiet} for each in trained]
        assert "features:" not in train(
            recipe(stages=stages, feature_cache=off or {}), tmp_path / f"off{bool(off)}"
        )
    monkeypatch.setattr(looking, "look", None)  # one epoch, nobody else asks: nothing is kept
    assert "features:" not in train(recipe(stages=[TINY["stages"][0]]), tmp_path / "once")
