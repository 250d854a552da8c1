"""Procedural pictures with questions whose answers are exactly known; a pure function of a seed."""
