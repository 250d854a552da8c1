"""Fusions, one file each: several encoders -> one feature map."""
