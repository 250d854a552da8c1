"""Recipes, stages, the loop and its checkpoints."""
