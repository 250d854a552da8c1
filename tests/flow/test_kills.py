"""Runs killed a hundred times end as one that never was; saving without care does not survive that."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.flow, pytest.mark.slow]
KILLS, SEED = 100, 7


def attack(folder, *options):
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.kills",
        str(folder),
        str(KILLS),
        str(SEED),
        *options,
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hundred_kills_lose_nothing(tmp_path):
    found = attack(tmp_path / "ours")
    fallen = Counter(found["fallen"])
    sys.stdout.write(f"{KILLS} kills in {found['runs']} runs: {dict(fallen)}\n")
    assert found["problems"] == []
    assert found["runs"] >= KILLS / 20
    assert fallen.total() == KILLS
    assert fallen["saving"] >= KILLS / 4
    assert fallen["training"]
    assert fallen["starting"]


def test_the_same_kills_ruin_a_run_that_saves_in_place(tmp_path):
    found = attack(tmp_path / "naive", "naive")
    assert found["problems"]
