"""Recipes: strict keys, derivation, overrides, and messages that name place, value and remedy."""

import json
import subprocess
import sys

import pytest
import yaml

from vlmix.core.errors import InputError, RecipeError, UnknownNameError
from vlmix.train.recipe import Recipe, recipe_schema
from vlmix.train.recipe_file import (
    differences,
    load_recipe,
    shipped_recipes,
    with_overrides,
    write_recipe,
)
from vlmix.train.yaml_file import parse_yaml

BASE = """
name: base
model:
  image_size: 48
  encoders: [{kind: clip, image_size: 32, weights: some/where}, {kind: convnext}]
  fusion: {kind: patch_mining}
  projector: {kind: mlp}
  language_model: {model_type: llama, rms_norm_eps: 1e-5}
  tokenizer: {train: {vocab_size: 400}}
stages:
  - name: align
    train: {"projector.*": 1e-3, "fusion.*": 2e-4}
    data: [{source: {kind: synth}}]
    batch_size: 8
    steps: 10
    before: [{kind: reinitialise, parameters: ["projector.*"]}]
evals:
  - {benchmark: {kind: synth_qa}, limit: 5}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def changed(tmp_path, old, new):
    assert BASE.count(old) == 1
    path = tmp_path / "changed.yaml"
    path.write_text(BASE.replace(old, new))
    return path


def test_a_recipe_reads_as_written_with_defaults_filled_in(base):
    recipe = load_recipe(base)
    stage = recipe.stages[0]
    assert list(stage.train.items()) == [("projector.*", 1e-3), ("fusion.*", 2e-4)]
    assert (stage.clip, stage.precision, stage.start_from, recipe.seed) == (1.0, "fp32", "previous", 0)
    assert recipe.model.language_model["rms_norm_eps"] == 1e-5
    assert recipe.model.encoders[0]["weights"] == "some/where"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image_size: 48", "image_sise: 48", r"model\.image_sise: unknown key.*'image_size'"),
        ("batch_size: 8", "batchsize: 8", r"stages\.0\.batchsize: unknown key.*'batch_size'"),
        ("batch_size: 8", "batch_size: -8", r"stages\.0\.batch_size: .*greater than 0.*-8"),
        ("batch_size: 8", "batch_size: much", r"stages\.0\.batch_size: .*integer.*'much'"),
        ("    steps: 10\n", "", "exactly one of `steps` and `epochs`"),
        ("steps: 10", "steps: 10\n    epochs: 1", "exactly one of `steps` and `epochs`"),
        ("steps: 10", "steps: 10\n    micro_batch_size: 9", "micro_batch_size 9 is larger than batch_size 8"),
        ("steps: 10", "steps: 10\n    schedule: {kind: cosin}", r"schedule\.kind.*'cosine'"),
        ("steps: 10", "steps: 10\n    optimizer: {kind: adam}", r"optimizer: no optimizer.*'adamw'"),
        (
            "{source: {kind: synth}}",
            "{source: {kind: synth}, weight: 2}, {source: {kind: synth}}",
            "every source a `weight`",
        ),
        (
            "{source: {kind: synth}}",
            "{source: {kind: synth}, group: a}, {source: {kind: synth}}",
            "every source a `group`",
        ),
        ("{source: {kind: synth}}", "{source: {kind: synth}, group: a, weight: 1}", "a `group` decides"),
        ("{kind: clip,", "{kind: clipp,", r"model\.encoders\.0: no encoder called 'clipp'.*'clip'"),
        ("{kind: patch_mining}", "{kind: patch_minin}", r"model\.fusion: no fusion called.*'patch_mining'"),
        ("fusion: {kind: patch_mining}", "fusion: {}", r"model\.fusion: `kind` is required"),
        ("{kind: reinitialise,", "{kind: reinit,", r"stages\.0\.before\.0: no transform called 'reinit'"),
        ("{kind: synth_qa}", "{kind: synthqa}", r"evals\.0\.benchmark: no benchmark called.*'synth_qa'"),
        ("tokenizer: {train: {vocab_size: 400}}", "tokenizer: {}", "exactly one of `weights`"),
        ("{model_type: llama, rms_norm_eps: 1e-5}", "{hidden_size: 3}", "either `weights`"),
        ("{model_type: llama, rms_norm_eps: 1e-5}", "{weights: a, b: 1}", "remove the other keys"),
        ("{model_type: llama, rms_norm_eps: 1e-5}", "{weights: a, config: {b: 1}}", "`config` is a text"),
        ("name: align", "name: Align It", r"stages\.0\.name"),
        ('{"projector.*": 1e-3, "fusion.*": 2e-4}', "{}", r"stages\.0\.train"),
        ("stages:\n", "stages: []\nother:\n", r"other: unknown key"),
    ],
)
def test_a_mistake_names_its_place_and_the_nearest_key(tmp_path, old, new, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(changed(tmp_path, old, new))
    assert caught.value.exit_code == 2


def test_stage_names_differ(tmp_path, base):
    stage = yaml.safe_load(BASE)["stages"][0]
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "stages": [stage, stage]}))
    with pytest.raises(RecipeError, match="two stages are called align"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3", r"bad\.yaml:3: "),
        ("a: 1\nb: 2\na: 3", r"bad\.yaml:3: the key 'a' is given twice"),
        ("a: !!python/object:os.system {}", r"bad\.yaml:1: "),
        ("- a\n- b", "a mapping of keys to values, not list"),
        ("", "a mapping"),
        ("a: \x00", "not readable"),
        ("[" * 5000, r"bad\.yaml"),
    ],
)
def test_what_is_not_yaml_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(UnknownNameError, match="no recipe called 'nlvrr'"):
        load_recipe("nlvrr")


def test_scalars_are_read_as_yaml_1_2_does():
    text = "[1e-3, 1.5E+2, .5, 7, no, on, yes, 1:30, 0x1f, true, null, ~, 2024-01-01, '1']"
    expected = [1e-3, 150.0, 0.5, 7, "no", "on", "yes", "1:30", 31, True, None, None, "2024-01-01", "1"]
    assert parse_yaml(text, "x") == expected


def test_base_merges_mappings_and_replaces_lists(tmp_path, base):
    (tmp_path / "sub").mkdir()
    middle, top = tmp_path / "sub" / "middle.yaml", tmp_path / "top.yaml"
    middle.write_text(
        "base: ../base.yaml\nname: middle\nmodel: {image_size: 64, projector: {kind: linear}}\n"
    )
    top.write_text(
        "base: sub/middle.yaml\nname: top\nmodel: {encoders: [{kind: siglip}], projector: {depth: 3}}\n"
    )
    recipe = load_recipe(top)
    assert (recipe.name, recipe.model.image_size) == ("top", 64)
    assert recipe.model.encoders == [{"kind": "siglip"}]
    assert recipe.model.projector == {"kind": "linear", "depth": 3}
    assert recipe.stages == load_recipe(base).stages
    with pytest.raises(RecipeError, match=r"item\.yaml: stages\.tune: the base has no such item, only align"):
        load_recipe(written(tmp_path / "item.yaml", "base: base.yaml\nstages: {tune: {steps: 3}}\n"))
    base.write_text("base: top.yaml\n" + BASE)
    with pytest.raises(
        RecipeError, match=r"leads back to itself: .*top\.yaml -> .*middle.* -> .*base.* -> .*top"
    ):
        load_recipe(top)
    top.write_text("base: 3")
    with pytest.raises(RecipeError, match="`base` is the path"):
        load_recipe(top)


def test_a_mapping_over_a_list_changes_its_items_by_name_or_place(tmp_path, base):
    text = """
base: base.yaml
model: {encoders: {1: {kind: siglip, layers: 3}}}
stages: {align: {steps: 3, train: {"fusion.*": 5e-4}, before: {0: null}}}
evals: {0: {limit: null}}
"""
    old, new = load_recipe(base), load_recipe(written(tmp_path / "new.yaml", text))
    assert new.model.encoders == [old.model.encoders[0], {"kind": "siglip", "layers": 3}]
    assert (new.stages[0].steps, new.stages[0].batch_size, new.stages[0].before) == (3, 8, [])
    assert new.stages[0].train == {"projector.*": 1e-3, "fusion.*": 5e-4}
    assert new.evals[0].limit is None
    assert load_recipe(base, ["stages.0.before.0=null", "evals.0=null"]).evals == []


def written(path, text):
    path.write_text(text)
    return path


def test_overrides_change_values_by_path(base):
    recipe = load_recipe(
        base,
        [
            "stages.0.steps=99",
            "stages.0.optimizer.weight_decay=1e-2",
            "model.encoders.1.widths=[1, 2, 3, 4]",
            "seed=7",
            "fidelity=[a, b]",
            "stages.0.clip=null",
        ],
    )
    stage = recipe.stages[0]
    assert (stage.steps, stage.optimizer["weight_decay"], stage.clip, recipe.seed) == (99, 0.01, None, 7)
    assert recipe.model.encoders[1] == {"kind": "convnext", "widths": [1, 2, 3, 4]}
    assert recipe.fidelity == ["a", "b"]
    assert load_recipe(base).stages[0].steps == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.stepps=3", r"stages\.0\.stepps: unknown key.*'steps'"),
        ("modell.image_size=3", r"modell: unknown key.*'model'"),
        ("stages.1.steps=3", "'1' is not a place in a list of 1"),
        ("stages.first.steps=3", "'first' is not a place in a list"),
        ("name.x=3", "nothing under 'base' to set 'x' in"),
        ("seed", "key.path=value"),
        ("=3", "key.path=value"),
        ("seed=[1", r"override seed:1"),
        ("seed=-1", r"seed: .*greater than or equal to 0"),
    ],
)
def test_a_wrong_override_is_refused(base, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(base, [override])


def test_overrides_leave_their_input_alone():
    raw = {"a": [{"b": 1}], "c": {"d": 2}}
    assert with_overrides(raw, ["a.0.b=5", "c.e=[x]"]) == {"a": [{"b": 5}], "c": {"d": 2, "e": ["x"]}}
    assert raw == {"a": [{"b": 1}], "c": {"d": 2}}


def test_a_written_recipe_reads_back_the_same_in_the_same_order(tmp_path, base):
    recipe = load_recipe(base)
    write_recipe(tmp_path / "again.yaml", recipe)
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert differences(recipe, again) == []
    assert list(again.stages[0].train) == ["projector.*", "fusion.*"]


def test_differences_name_the_key_and_both_values(base):
    old = load_recipe(base)
    assert differences(old, load_recipe(base, ["seed=3", "evals=[]", "stages.0.workers=4", "name=x"])) == [
        "seed: 0 -> 3"
    ]
    assert differences(old, load_recipe(base, ["model.fusion.heads=2"])) == [
        "model.fusion.heads: absent -> 2"
    ]
    turned = load_recipe(base, ['stages.0.train={"fusion.*": 2e-4, "projector.*": 1e-3}'])
    assert differences(old, turned) == [
        "stages.0.train (order): projector.*, fusion.* -> fusion.*, projector.*"
    ]


def test_the_schema_describes_every_stage_key():
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    stage = schema["$defs"]["Stage"]
    assert {"train", "data", "batch_size", "before", "start_from"} <= set(stage["properties"])
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name in {name.replace("/", "_"), name.rpartition("/")[2]}


def test_reading_a_recipe_needs_no_torch(base):
    code = (
        "import sys; from vlmix.train.recipe_file import load_recipe; "
        f"load_recipe({str(base)!r}); print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
