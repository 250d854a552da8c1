"""What `make bench-fusion-claims` says of made-up results, and one training of it at its smallest."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT

SHEETS = 60


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("fusion_claims")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def rows(claims):
    """Three seeds in which every arm reads the first so many sheets of one word right."""

    def made(right):
        return {
            (seed, arm): {
                "right": " ".join("1" if sheet < right(arm, seed) else "0" for sheet in range(SHEETS)),
                "kinds": " ".join(str(sheet % 4) for sheet in range(SHEETS)),
                "step_seconds": 0.1,
            }
            for seed in range(3)
            for arm in claims.ARMS
        }

    return made


@pytest.fixture
def costs(claims):
    figures = {"visual_tokens": 9, "multiply_adds": 5, "fresh_parameters": 7}
    return {name: figures | {"multiply_adds": 5 + (name != "channel_concat")} for name in claims.FUSIONS}


def test_what_the_paper_found_is_said_to_be_reproduced(claims, rows, costs):
    def right(arm, seed):
        del seed
        return 20 + 10 * arm.unfrozen + 8 * arm.aligned + 12 * (len(arm.eyes) == 2)

    found = claims.findings(rows(right), costs)
    assert [finding["verdict"] for finding in found.values()] == ["reproduced"] * 4
    gaps = [claim["pooled"]["value"] for finding in found.values() for claim in finding["comparisons"][:1]]
    assert gaps == pytest.approx([10 / SHEETS, 0.0, 12 / SHEETS, 8 / SHEETS])


def test_the_contrary_is_said_to_be_not_reproduced(claims, rows, costs):
    def right(arm, seed):
        del seed
        behind = 15 * (arm.fusion == "channel_concat")
        return 40 - 10 * arm.unfrozen - 8 * arm.aligned + 8 * (len(arm.eyes) == 1) - behind

    found = claims.findings(rows(right), costs)
    assert [finding["verdict"] for finding in found.values()] == ["not reproduced"] * 4


def test_one_seed_that_disagrees_leaves_it_open_and_so_does_an_interval_around_nothing(claims, rows, costs):
    def one_against(arm, seed):
        return 30 + arm.unfrozen * (-2 if seed == 2 else 25)

    assert claims.findings(rows(one_against), costs)["unfreezing helps"]["verdict"] == "undecided"
    same = claims.findings(rows(lambda arm, seed: 30), costs)
    assert same["unfreezing helps"]["verdict"] == "undecided"
    assert same["more encoders help"]["verdict"] == "undecided"


def test_a_cheaper_fusion_takes_the_efficiency_away(claims, rows, costs):
    costs["deformable"]["multiply_adds"] = 4
    found = claims.findings(rows(lambda arm, seed: 30), costs)["channel concatenation competes"]
    assert not found["best_efficiency"]
    assert found["verdict"] == "not reproduced"


def test_the_page_shows_every_arm_and_every_finding(claims, rows, costs):
    made = rows(lambda arm, seed: 30 + seed)
    report = {"arms": claims.table(made), "findings": claims.findings(made, costs), "costs": costs}
    page = claims.page(report)
    assert all(f"| `{name}` |" in page for name in claims.FUSIONS)
    assert page.count("**undecided**") + page.count("**reproduced**") == 4


def test_what_was_not_run_for_every_seed_is_left_out(claims, rows, costs):
    made = rows(lambda arm, seed: 30 + 5 * arm.unfrozen)
    made = {key: row for key, row in made.items() if key[0] == 0 or not key[1].aligned}
    found = claims.findings(made, costs)
    assert found["unfreezing helps"]["verdict"] == "reproduced"
    assert found["alignment before helps"] == {"verdict": "not run", "comparisons": []}
    report = {"arms": claims.table(made), "findings": found, "costs": costs}
    assert claims.page(report).count("not run") == 2 * len(claims.FUSIONS)
    few = {key: row for key, row in made.items() if key[0] < 2}
    assert claims.findings(few, costs)["unfreezing helps"]["verdict"] == "too few seeds"


@pytest.mark.slow
def test_a_training_is_kept_and_not_run_again(claims, tmp_path):
    sizes = claims.Sizes(low=1, high=1, decoder=1, alone=1, join=1, answer=1, pictures=6)
    arms = [claims.Arm("channel_concat", unfrozen=True, aligned=aligned) for aligned in (False, True)]
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            claims.Workers(pool, tmp_path).train(0, arms, sizes)
    kept = claims.Results(tmp_path / "runs.jsonl")
    assert [len(kept.find(0, arm, sizes)["right"].split()) for arm in arms] == [6, 6]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
