"""Edit distance between texts (Levenshtein 1966)."""

from __future__ import annotations


def edit_distance(one: str, other: str) -> int:
    """The least number of characters to insert, delete or replace."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
