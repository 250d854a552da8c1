"""Runs that several files look at."""

import pytest

from tests.processes import Crew
from tests.runs import recipe, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(recipe(), out)


@pytest.fixture(scope="session")
def crew():
    """Two processes for every run of two: their first takes longer than ten others."""
    with Crew() as crew:
        yield crew
