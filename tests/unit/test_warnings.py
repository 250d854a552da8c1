"""Settings that work but are hardly meant: a warning names them before any weight exists, and no others."""

from __future__ import annotations

import json

import pytest
import yaml

from tests import tiny
from tests.runs import TINY
from vlmix.cli.inspect import plan
from vlmix.cli.train import train
from vlmix.core.errors import PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.core.parts import ENCODERS, FUSIONS, read_part
from vlmix.core.tensors import VisionSpec
from vlmix.models.cautions import cautions
from vlmix.models.configuration import VlmixConfig

LOW, SAME, FINE = VisionSpec((4, 4), 8), VisionSpec((4, 4), 6), VisionSpec((8, 8), 6)
COARSE = VisionSpec((2, 2), 6)
VIT = VisionSpec((4, 4), 8, blocks=4, token_blocks=True)


def warnings(kind, specs, **settings):
    parsed = read_part(FUSIONS, {"kind": kind, **settings})
    FUSIONS.get(kind).plan(parsed, specs)
    return FUSIONS.get(kind).warnings(parsed, specs)


@pytest.mark.parametrize(
    ("kind", "specs", "settings", "words"),
    [
        ("patch_mining", [LOW, SAME], {}, "nothing to choose"),
        ("channel_concat", [LOW, COARSE], {}, "encoder 1 gives (2, 2), which is interpolated to (4, 4): 16"),
        ("channel_concat", [LOW, FINE], {"grid": [8, 8]}, "encoder 0 gives (4, 4), which is interpolated"),
        ("spatial_aggregator", [LOW, SAME], {}, "nothing is gathered in space"),
        ("mixture_of_resolution", [VIT, FINE], {"after": []}, "`after` is empty"),
        ("mixture_of_resolution", [VIT, COARSE], {}, "adds no resolution"),
        ("single", [LOW, SAME, FINE], {"which": 1}, "encoders [0, 2] do not run"),
        ("attention_pool", [LOW, FINE], {"heads": 2}, "encoders [1] do not run"),
    ],
)
def test_what_is_hardly_meant_is_named(kind, specs, settings, words):
    (line,) = warnings(kind, specs, **settings)
    assert line.startswith(f"{kind}: ")
    assert words in line


@pytest.mark.parametrize(
    ("kind", "specs", "settings"),
    [
        ("patch_mining", [LOW, FINE], {}),
        ("channel_concat", [LOW, SAME, FINE], {}),
        ("channel_concat", [LOW, FINE], {"grid": [2, 2]}),
        ("spatial_aggregator", [LOW, FINE], {}),
        ("spatial_aggregator", [LOW, SAME], {"grid": [2, 2]}),
        ("mixture_of_resolution", [VIT, SAME], {}),
        ("mixture_of_resolution", [VIT, FINE], {"after": [1]}),
        ("deformable", [LOW, SAME], {"heads": 1, "points": 1}),
        ("sequence_append", [LOW, COARSE], {"width": 4}),
        ("single", [LOW], {}),
        ("attention_pool", [LOW], {"heads": 2}),
    ],
)
def test_what_is_meant_gives_none(kind, specs, settings):
    assert warnings(kind, specs, **settings) == []


@pytest.mark.parametrize(
    ("kind", "specs", "settings", "words"),
    [
        ("patch_mining", [LOW, VisionSpec((6, 6), 8)], {}, "does not divide"),
        ("patch_mining", [LOW, COARSE], {}, "does not divide"),
        ("spatial_aggregator", [LOW, VisionSpec((6, 6), 8)], {}, "does not divide"),
        ("mixture_of_resolution", [VIT, VisionSpec((6, 6), 8)], {}, "does not divide"),
        ("attention_pool", [VisionSpec((5, 5), 8)], {"heads": 2}, "no whole number"),
        ("attention_pool", [LOW], {"heads": 2, "window": 1}, "nothing to choose"),
    ],
)
def test_what_cannot_be_is_refused(kind, specs, settings, words):
    with pytest.raises(PlanError, match=words):
        warnings(kind, specs, **settings)


@pytest.mark.parametrize("name", ENCODERS.names())
def test_a_resolution_that_is_no_multiple_of_the_stride_is_refused(name):
    settings = ENCODERS.get(name).settings_class.tiny()
    odd = {**settings.model_dump(mode="json"), "image_size": settings.image_size + 1}
    try:
        promised = ENCODERS.get(name).promise(read_part(ENCODERS, odd))
    except PlanError as refusal:
        assert str(settings.image_size + 1) in str(refusal)  # noqa: PT017 - some encoders take any size
    else:
        # Only an encoder that chooses its own grid takes any size; its map is as it was.
        assert promised == ENCODERS.get(name).promise(settings)


def doubtful():
    """Enlarged pictures, and a window of one cell."""
    changed = json.loads(json.dumps(TINY))
    changed["model"]["image_size"] = 24
    changed["model"]["encoders"][1] |= {"stages": [3], "image_size": 64}
    return changed


def test_a_model_tells_of_enlarged_pictures_as_well():
    base = tiny.config()
    assert cautions(base) == []
    lines = cautions(VlmixConfig(**{**base.to_dict(), "image_size": 16}))
    assert [line.partition(" reads")[0] for line in lines] == ["encoders.0 (clip)", "encoders.1 (convnext)"]
    assert all("pictures are made 16" in line for line in lines)
    tiles = VlmixConfig(**{**base.to_dict(), "image_size": 16, "views": {"kind": "hd"}})
    assert cautions(tiles) == []


def test_plan_prints_them_and_puts_them_in_json(tmp_path, monkeypatch, capsys):
    path = tmp_path / "doubtful.yaml"
    path.write_text(yaml.safe_dump(doubtful()), encoding="utf-8")
    plan(str(path), overrides=[], as_json=True, images=1, text_tokens=8)
    found = json.loads(capsys.readouterr().out)["warnings"]
    assert len(found) == 3
    assert "nothing to choose" in found[2]
    monkeypatch.setenv("FORCE_COLOR", "1")
    plan(str(path), overrides=[], as_json=False, images=1, text_tokens=8)
    shown = capsys.readouterr().out
    assert [line for line in found if f"\x1b[33mwarning: {line}\x1b[0m" in shown] == found


def test_train_begins_with_them(tmp_path, monkeypatch, capsys):
    path = tmp_path / "doubtful.yaml"
    path.write_text(yaml.safe_dump(doubtful()), encoding="utf-8")
    monkeypatch.setattr("vlmix.cli.flow.train_and_judge", lambda *_, **__: [])
    train(str(path), overrides=[], out_dir=tmp_path / "run", resume=False, tiny=False)
    shown = capsys.readouterr().err
    assert shown.count("warning: ") == 3
    assert "nothing to choose" in shown
    assert not (tmp_path / "run").exists()


def test_a_bias_that_no_router_has_is_told():
    def lines(router):
        mixture = {"router": {"kind": router}, "balance": {"switch": 0.0, "bias_rate": 0.01}}
        return cautions(tiny.config(experts=[ExpertSettings.model_validate(mixture).model_dump(mode="json")]))

    assert lines("sigmoid") == []
    (line,) = lines("topk")
    assert line.startswith("experts.0.balance.bias_rate: topk has no bias")
