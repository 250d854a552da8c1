"""Searches over mixtures of encoders and settings: ``run`` a grid file, resume it, read what it found."""

from __future__ import annotations

from vlmix.search.engine import run
from vlmix.search.grid_file import load_grid, shipped_grids

__all__ = ["load_grid", "run", "shipped_grids"]
