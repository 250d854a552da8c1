"""Mixtures of experts: routers, stacked experts, how networks are found and replaced, and balance losses."""
