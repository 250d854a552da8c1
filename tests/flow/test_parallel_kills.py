"""One of two processes killed in the middle of a save: the other ends, nothing is lost, both go on."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.kills_together import MOMENTS

pytestmark = [pytest.mark.flow, pytest.mark.slow]


def test_a_process_killed_while_both_save_costs_no_step(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kills_together", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    whole = found.pop("never")
    assert whole["codes"] == [0, 0]
    assert [row["global_step"] for row in whole["told"]] == [1, 2, 3, 4]
    assert found.keys() == MOMENTS.keys()
    for moment, (rank, _, _, _, step) in MOMENTS.items():
        left = found[moment]
        assert left["killed"][rank] == -signal.SIGKILL, moment
        assert left["killed"][1 - rank] == 1, moment
        # The time-out, a beat, and room for a busy machine.
        assert left["took"] < 30, moment
        assert (left["step"], left["problems"]) == (step, []), moment
        assert left["codes"] == [0, 0], moment
        assert left["left"] == whole["left"], moment
        # As if nothing had happened: steps, losses, every bit of the weights.
        assert left["told"] == whole["told"], moment
        assert left["digest"] == whole["digest"], moment
