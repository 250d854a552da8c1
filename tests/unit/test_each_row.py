"""Work on every row: in order at any number of processes, and a process that dies is told."""

import math
import os

import pytest

from vlmix.core.errors import VlmixError
from vlmix.data.each_row import each_row


def test_results_come_in_order_from_any_number_of_processes():
    expected = [math.sqrt(row) for row in range(300)]
    assert list(each_row(math.sqrt, 300)) == expected
    assert list(each_row(math.sqrt, 300, workers=2)) == expected
    assert list(each_row(math.sqrt, 0, workers=1)) == []


def test_an_error_of_the_work_is_raised_here():
    with pytest.raises(ValueError, match="math domain"):
        list(each_row(math.log, 40, workers=1))


def test_a_process_that_dies_ends_the_work_with_a_remedy():
    with pytest.raises(VlmixError, match="fewer --workers"):
        list(each_row(os._exit, 3, workers=1))
