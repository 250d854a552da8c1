"""Judging: benchmarks, the runner, statistics and reports."""
