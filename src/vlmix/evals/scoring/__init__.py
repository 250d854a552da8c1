"""Scoring rules, one file for each benchmark: they read text and nothing else."""
