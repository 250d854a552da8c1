"""Projectors, one file each: fused map -> tokens of the language model's width."""
