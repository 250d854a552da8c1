"""What a check found, as a folder: report.json, lengths.png and quarantine.jsonl."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from vlmix.core.errors import InputError
from vlmix.core.files import MANIFEST, read_json, write_bytes, write_json
from vlmix.data.check import Findings

SCHEMA: Final = "vlmix.data_check/1"
REPORT, PLOT = "report.json", "lengths.png"
_PERCENTILES: Final = (1, 5, 25, 50, 75, 95, 99)
_EXAMPLES: Final = 20


def check_folder(folder: Path) -> None:
    """Refuse to put a report where it would replace anything but an older one.

    Raises:
        InputError: if there is a file, or a folder that holds something else.

    """
    if not folder.exists():
        return
    manifest = folder / MANIFEST
    old = manifest.is_file() and read_json(manifest).get("schema") == SCHEMA
    if not old and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} exists and is no report of a check, which replaces its folder. Choose another"
        )


def summary(found: Findings) -> dict[str, Any]:
    """One set's figures: rows, faults, lengths, pictures and ids that come more than once."""
    bad = sum(found.faults.values())
    text, visual = np.array(found.text, dtype=np.int64), np.array(found.visual, dtype=np.int64)
    return {
        "name": found.name,
        "rows": {"read": found.rows, "used": found.rows - bad, "quarantined": bad},
        "faults": dict(found.faults),
        "unit": found.unit,
        "max_length": found.max_length,
        "over_max_length": found.over,
        "lengths": {
            "text": spread(text),
            "visual": spread(visual),
            "total": spread(text + visual),
        },
        "repeated_ids": _repeated(found.ids, found.id_rows),
        "pictures": _pictures(found),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, mean, most, sum and percentiles of a row of numbers; nothing where there is none."""
    if not len(values):
        return {}
    ranks = np.percentile(values, _PERCENTILES)
    return {
        "min": int(values.min()),
        **{f"p{p}": float(rank) for p, rank in zip(_PERCENTILES, ranks, strict=True)},
        "max": int(values.max()),
        "mean": float(values.mean()),
        "sum": int(values.sum()),
    }


def _repeated(keys: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """How many keys come more than once, and the first rows that repeat an earlier one."""
    keys_N, rows_N = np.array(keys, dtype=np.uint64), np.array(rows, dtype=np.int64)
    _, first_N, counts_N = np.unique(keys_N, return_index=True, return_counts=True)
    again_N = np.setdiff1d(np.arange(len(keys_N)), first_N)
    shown = np.unique(rows_N[again_N])[:_EXAMPLES].tolist()
    return {"count": int((counts_N > 1).sum()), "first_rows": shown}


def _pictures(found: Findings) -> dict[str, Any]:
    """Pictures that are the same, byte for byte: in one row, in several, in several places."""
    kinds_N, rows_N = np.array(found.pictures, dtype=np.uint64), np.array(found.picture_rows, dtype=np.uint64)
    shown = np.stack([kinds_N, rows_N], axis=1)
    pairs, counts = np.unique(shown, axis=0, return_counts=True)
    twice = pairs[counts > 1, 1]
    places = np.unique(np.stack([kinds_N, np.array(found.places, dtype=np.uint64)], axis=1), axis=0)
    _, copies = np.unique(places[:, 0], return_counts=True)
    return {
        "shown": len(kinds_N),
        "different": len(np.unique(kinds_N)),
        "in_several_rows": _repeated(pairs[:, 0].tolist(), pairs[:, 1].tolist()),
        "in_several_places": int((copies > 1).sum()),
        "twice_in_one_row": {
            "count": len(twice),
            "first_rows": sorted({int(row) for row in twice})[:_EXAMPLES],
        },
    }


def write_findings(folder: Path, title: str, findings: Sequence[Findings]) -> dict[str, Any]:
    """Write report and plot into ``folder`` and return the report."""
    sets = [summary(found) for found in findings]
    total = {key: sum(each["rows"][key] for each in sets) for key in ("read", "used", "quarantined")}
    report = {"schema": SCHEMA, "checked": title, "rows": total, "sets": sets}
    write_json(folder / REPORT, report)
    write_bytes(folder / PLOT, draw_lengths(findings))
    return report


def draw_lengths(findings: Sequence[Findings]) -> bytes:
    """A picture (PNG): for each set, how many rows have how many units of text, of pictures and in all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * max(len(findings), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, found in enumerate(findings):
        axes = figure.add_subplot(len(findings), 1, row + 1)
        text, visual = np.array(found.text, dtype=np.int64), np.array(found.visual, dtype=np.int64)
        shown = {"text": text, "visual": visual, "total": text + visual}
        most = max((int(values.max()) for values in shown.values() if len(values)), default=1)
        edges = np.unique(np.linspace(0, max(most, 1) + 1, 61).round())
        for label, values in shown.items():
            if len(values) and values.any() and not (label == "total" and not visual.any()):
                axes.hist(values, bins=edges.tolist(), histtype="step", label=label)
        if found.max_length is not None and found.max_length <= 4 * most:
            axes.axvline(found.max_length, color="black", linestyle="--", label="max_length")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
        axes.set_title(f"{found.name}: {found.rows:,} rows", fontsize="medium", loc="left")
        axes.set_xlabel(f"{found.unit} a row")
        axes.set_ylabel("rows")
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
