"""Every shipped recipe loads, plans without weights or data, shrinks and trains; published facts hold.

Recipes are found by listing. Those that differ only in sizes shrink to the same one, which is trained once.
"""

import io
import json

import pytest
import torch
from rich.console import Console

from tests.conftest import ROOT
from vlmix.core.errors import InputError
from vlmix.core.parts import ENCODERS
from vlmix.models.plan import parameter_count, shape_only
from vlmix.train.build import check_parts, recipe_config
from vlmix.train.costs import stage_costs
from vlmix.train.data_sets import planned_sizes
from vlmix.train.recipe_file import load_recipe, shipped_recipes
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe
from vlmix.train.stages import stage_order
from vlmix.train.tiny import STEPS, shrunk

pytestmark = pytest.mark.slow
each_recipe = pytest.mark.parametrize("name", shipped_recipes())
trained = {}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One folder for the tiny data of all recipes, so that equal recipes name equal files."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def _away_from_real_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_of(name, *overrides):
    return recipe_config(load_recipe(name, overrides))


def structure(recipe):
    """What shrinking must keep."""
    config = recipe_config(recipe)
    kinds = [[part.kind, part.sees, part.resize] for part in config.encoder_settings()]
    parts = [config.view_settings().kind, config.fusion_settings().kind, config.projector_settings().kind]
    kept = ("name", "train", "chat_template", "fit", "schedule", "precision", "optimizer", "clip")
    stages = [
        [*(getattr(stage, key) for key in kept), list(stage.train), stage.solo and stage.solo.encoder]
        for stage in recipe.stages
    ]
    mixes = [[entry.source["kind"] for entry in stage.data] for stage in recipe.stages]
    language = (config.language.model_type, recipe.model.chat_template, recipe.model.fit)
    return kinds, parts, language, stages, mixes


def ratios(recipe):
    """How many cells of each encoder stand along one of the first's, where that is a whole number."""
    rows = [spec.grid[0] for spec in recipe_config(recipe).plan().offered]
    return [row / rows[0] if row % rows[0] == 0 else None for row in rows]


@each_recipe
def test_it_plans_without_weights_or_data(name):
    recipe = load_recipe(name)
    check_parts(recipe)
    plan = recipe_config(recipe).plan()
    assert 0 < plan.tokens < recipe.model.max_length
    for index, stage in enumerate(recipe.stages):
        sizes, _ = planned_sizes(stage)
        assert stage.steps or stage_order(recipe, index, sizes).steps > 0
        for entry in stage.data:
            assert "path" not in entry.source or (entry.get and entry.rows and entry.name) or name == "nlvr"
    assert recipe.paper
    assert recipe.fidelity


@each_recipe
def test_it_shrinks_to_the_same_structure_and_trains(name, data, tmp_path):
    recipe = load_recipe(name)
    small = shrunk(recipe, data)
    assert structure(small) == structure(recipe)
    assert all(a is None or a == b for a, b in zip(ratios(recipe), ratios(small), strict=True))
    assert parameter_count(shape_only(recipe_config(small))) < 500_000
    key = json.dumps(small.model_dump(mode="json", exclude={"name", "paper"}), sort_keys=True)
    if key not in trained:
        run_recipe(small, tmp_path / "run", console=Console(file=io.StringIO()))
        trained[key] = read_metrics(tmp_path / "run/metrics.jsonl")
    steps = trained[key]
    assert [row["stage"] for row in steps] == [stage.name for stage in recipe.stages for _ in range(STEPS)]
    assert all(torch.tensor(row["loss"]).isfinite() for row in steps)
    assert sum(row["quarantined"] for row in steps) == 0


@pytest.mark.parametrize("name", ENCODERS.names())
def test_every_encoder_shrinks_from_its_published_size(name):
    """If a new encoder fails here, name its sides in pixels and cells in `lengths`, or give it `shrunk`."""
    cls = ENCODERS.get(name)
    for factor in range(12, 0, -1):
        try:
            settings = cls.settings_class().shrunk(factor)
            spec = cls.promise(settings)
        except InputError:
            continue
        if min(spec.grid) > 1:
            break
    part = cls(settings).eval()
    assert part(torch.rand(1, 3, 64, 64)).grid == spec.grid
    assert spec.tokens <= 400
    assert parameter_count(part) < 200_000


@pytest.mark.parametrize(
    ("pattern", "tokens", "channels"),
    [("/llava/", 576, 1024), ("mini_gemini/", 576, 1024), ("_hd", 2880, 1024), ("eagle/", 1024, None),
     ("llava_hr/*1024", 1024, 1024), ("llava_hr/*384", 576, 1024), ("x2_", 1024, 4096), ("x4_", 1024, 6656),
     ("x5_", 1024, 7680), ("moe_llava/*as_released", 576, 1024), ("moe_llava/*384", 728, 1152)],
)  # fmt: skip
def test_visual_tokens_and_channels_are_the_published_ones(pattern, tokens, channels):
    words = pattern.split("*")
    names = [
        n
        for n in shipped_recipes()
        if all(w in f"/{n}" for w in words) and ("_hd" in n) == (pattern == "_hd")
    ]
    assert names
    for name in names:
        plan = config_of(name).plan()
        assert plan.tokens == tokens
        assert channels in (None, plan.fused.channels)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llava/v1_5_7b", {"projector": 20.98, "": 7050}),
        ("mini_gemini/2b", {"projector": 6.30, "fusion": 6.96}),
        ("mini_gemini/7b", {"projector": 20.98, "fusion": 6.96, "encoders": 487}),
        ("mini_gemini/8b", {"projector": 20.98}),
        ("mini_gemini/8x7b", {"projector": 20.98, "language_model": 46_703}),
        ("mini_gemini/13b", {"projector": 31.47}),
        ("mini_gemini/34b", {"projector": 58.73, "language_model": 34_389}),
        ("eagle/x4_7b", {"projector": 44.05}),
        ("eagle/x5_7b", {"projector": 48.24, "encoders": 2271}),
        ("moe_llava/stablelm_1_6b_paper", {"projector": 6.30, "language_model": 2890}),
        ("moe_llava/ablations/dense", {"language_model": 1837}),
        ("moe_llava/openchat_7b_paper", {"projector": 20.98, "language_model": 15_697}),
        ("llava_hr/7b_1024", {"fusion.adapters.0": 6.09}),
        ("llava_hr/x_13b_1024", {"fusion.adapters.0": 14.74}),
    ],
)
def test_parameters_are_the_published_ones(name, millions):
    model = shape_only(config_of(name)).model
    for part, expected in millions.items():
        assert parameter_count(model.get_submodule(part)) / 1e6 == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "rows", "steps"),
    [
        ("llava/v1_5_13b", [558_128, 665_298], [2181, 5198]),
        ("mini_gemini/7b", [1_250_000, 1_500_000], [4883, 11_719]),
        ("mini_gemini/34b_hd", [1_500_000], [11_719]),
        ("eagle/x5_7b", [558_128, 1_800_000], [2181, 14_063]),
        ("fusions/deformable", [558_128, 933_298], [2181, 7292]),
        ("llava_hr/7b_384", [558_128], [2181]),
        ("moe_llava/phi2_2_7b_paper", [558_128, 1_004_700, 665_300], [2181, 7850, 5198]),
        ("moe_llava/ablations/one_stage", [558_128, 1_629_300], [2181, 12_729]),
    ],
)
def test_rows_and_steps_are_the_published_ones(name, rows, steps):
    recipe = load_recipe(name)
    sizes = [planned_sizes(stage)[0] for stage in recipe.stages]
    assert [sum(each) for each in sizes] == rows
    assert [stage_order(recipe, index, each).steps for index, each in enumerate(sizes)] == steps


def test_a_stage_costs_what_it_has_experts_for():
    name = "moe_llava/qwen_1_8b_paper"
    costs = stage_costs(load_recipe(name), config_of(name), images=1, text_tokens=8)
    dense, sparse = costs[1].weight_bytes, costs[2].weight_bytes
    assert sparse - dense == 4 * 12 * (3 * 3 * 2048 * 5504 + 4 * 2048)  # three more networks, and a router
    assert costs[2].trainable == 12 * (4 * 3 * 2048 * 5504 + 4 * 2048)


def test_experts_in_listed_layers_shrink_with_the_decoder(data):
    listed = "stages.2.before.0.experts={layers: [0, 5, 23], count: [2, 4, 8], router: {kind: topk, k: 1}}"
    small = shrunk(load_recipe("moe_llava/qwen_1_8b_paper", [listed]), data)
    experts = small.stages[2].before[0]["experts"]
    assert (experts["layers"], experts["count"]) == ([0, 1], [4, 8])


def test_a_fusion_that_goes_on_inside_the_decoder_shrinks_with_it(data, tmp_path):
    inside = "inside: {after: [0, 3, 6, 9], width: 4096}"
    fusion = f"model.fusion={{kind: spatial_aggregator, grid: [24, 24], {inside}}}"
    recipe = load_recipe("mini_gemini/7b", [fusion, "stages.1=null", "model.encoders.1.stages=[1]"])
    small = shrunk(recipe, data)
    assert recipe_config(small).plan().inside == (0, 1)
    run_recipe(small, tmp_path / "run", console=Console(file=io.StringIO()))


def test_the_page_of_recipes_names_them_all():
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert [name for name in shipped_recipes() if f"`{name}`" not in page] == []


def test_absent_data_is_costed_with_its_published_rows_and_said():
    costs = stage_costs(load_recipe("llava/v1_5_7b"), config_of("llava/v1_5_7b"), images=1, text_tokens=64)
    assert [cost.samples for cost in costs] == [2181 * 256, 5198 * 128]
    assert costs[0].notes == ("LCS-558K: absent; planned with its published 558,128 rows",)
    assert costs[0].trainable == 20_979_712
    assert costs[1].flops > costs[0].flops > 1e18


def test_the_fusions_differ_in_nothing_but_the_fusion():
    """ConvNeXt's stages excepted, of which mining reads all: in the last alone a window would be one cell."""
    recipes = [load_recipe(name) for name in shipped_recipes() if name.startswith("fusions/")]
    assert len({recipe.model.fusion["kind"] for recipe in recipes}) == len(recipes) == 5
    plain = []
    for recipe in recipes:
        raw = recipe.model_dump(mode="json", exclude={"name", "fidelity"})
        raw["model"].pop("fusion")
        raw["model"]["encoders"][1].pop("stages")
        raw["stages"][0]["train"].pop("fusion.*", None)
        plain.append(raw)
    assert all(raw == plain[0] for raw in plain)


def test_two_recipes_in_a_chain_have_the_same_weights():
    """The second starts from the first one's model, so every tensor must have its place there."""
    for first, second, *overrides in (
        ("llava_hr/7b_384", "llava_hr/7b_1024"),
        ("llava_hr/x_13b_384", "llava_hr/x_13b_1024"),
        ("mini_gemini/8b", "mini_gemini/8b_hd", "stages.1=null"),
    ):
        start = load_recipe(first, overrides)
        assert len(start.stages) == 1
        assert load_recipe(second).stages[0].start_from.startswith(f"runs/{start.name}")
        shapes = [
            {key: value.shape for key, value in shape_only(config_of(name)).state_dict().items()}
            for name in (first, second)
        ]
        assert shapes[0] == shapes[1]


def test_adapters_that_are_frozen_at_the_start_change_nothing(data):
    """Why LLaVA-HR's first stage may have them, where the authors made none."""
    torch.manual_seed(0)
    config = recipe_config(shrunk(load_recipe("llava_hr/7b_384"), data))
    with_adapters = type(shape_only(config))(config).eval()
    config.fusion = {**config.fusion, "after": []}
    without = type(with_adapters)(config).eval()
    kept = {key: value for key, value in with_adapters.state_dict().items() if ".adapters." not in key}
    without.load_state_dict(kept)
    pixels = torch.rand(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        both = [model.get_image_features(pixels).pooler_output for model in (with_adapters, without)]
    assert torch.equal(*both)
