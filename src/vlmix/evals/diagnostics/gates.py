"""What the fusion's gates and routers give each encoder, by task, and how large what each adds is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Finding, Table
from vlmix.evals.diagnostics._gates import Gate, GateReader, reader_of
from vlmix.evals.diagnostics._looks import look_at
from vlmix.evals.diagnostics._subject import Subject
from vlmix.evals.diagnostics._telling import number, percent, rounded

Measure = Literal["weights", "sizes", "shares"]
_MEASURES: tuple[Measure, ...] = ("weights", "sizes", "shares")
_TITLES = {"weights": "mean weight", "sizes": "mean size of what is added", "shares": "share of the size %"}
Places = dict[str, dict[str, dict[Measure, list[Tensor]]]]
"""What was measured on every question, (E,) each, by place, task and measure."""


@DIAGNOSTICS.register("gates")
class Gates(Diagnostic):
    """Mean weight of every encoder, and its importance ||g f|| as MoME measures it (arXiv:2407.12709, 4)."""

    def obstacle(self, subject: Subject) -> str:
        """Only some fusions weigh their encoders."""
        if _reader(subject) is not None:
            return ""
        kind = subject.model.config.fusion_settings().kind
        return f"The fusion {kind} of this model has no gate or router that weighs encoders."

    def examine(self, subject: Subject) -> Finding:
        """Listen while every question's pictures are looked at; questions count alike, however many views."""
        reader = _reader(subject)
        found: Places = {}
        if reader is not None:
            with reader.listening() as heard:
                for sample in subject.samples:
                    heard.clear()
                    seen = look_at(subject.model, subject.answering.processor, sample)
                    for gate in reader.read(seen, heard) if seen is not None else ():
                        _note(found, gate, sample.task)
        return Finding(
            title="Gates and routers",
            reading=(
                "Weight: what the fusion multiplies an encoder's part by, or its share of the attention; the "
                "mean over questions. Size: ||g f||, how large the part is that is really added, which a "
                "weight alone does not say because maps differ in size. Both are taken inside the fusion, "
                "where maps have been brought to one width; a dash marks what does not exist there.",
            ),
            tables=[table for place, tasks in found.items() for table in _tables(subject, place, tasks)],
            data={place: _data(subject, tasks) for place, tasks in found.items()},
        )


def _reader(subject: Subject) -> GateReader | None:
    model = subject.model.model
    return reader_of(model.fusion, model.viewing.plan.offered)


def _note(found: Places, gate: Gate, task: str) -> None:
    sizes = gate.sizes
    shares = (
        None if sizes is None else sizes / sizes.sum(1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
    )
    measured: dict[Measure, Tensor | None] = {"weights": gate.weights, "sizes": sizes, "shares": shares}
    for measure, values in measured.items():
        if values is not None:
            rows = found.setdefault(gate.place, {}).setdefault(task, {})
            rows.setdefault(measure, []).append(values.double().mean(0).cpu())


def _means(rows: Sequence[Tensor]) -> list[float | None]:
    return [None if value != value else value for value in torch.stack([*rows]).mean(0).tolist()]  # noqa: PLR0124 - NaN


def _tables(subject: Subject, place: str, tasks: dict[str, dict[Measure, list[Tensor]]]) -> list[Table]:
    tables: list[Table] = []
    for measure in _MEASURES:
        own = {task: rows[measure] for task, rows in sorted(tasks.items()) if measure in rows}
        if not own:
            continue
        told = percent if measure == "shares" else number
        every = [one for rows in own.values() for one in rows]
        rows = [["all", *map(told, _means(every)), str(len(every))]]
        if len(own) > 1:
            rows += [[task, *map(told, _means(one)), str(len(one))] for task, one in own.items()]
        title = f"{place}: {_TITLES[measure]}"
        tables.append(Table(title, ("task", *subject.encoders, "questions"), rows))
    return tables


def _data(subject: Subject, tasks: dict[str, dict[Measure, list[Tensor]]]) -> dict[str, object]:
    def told(rows: Sequence[Tensor]) -> dict[str, float | None]:
        return dict(zip(subject.encoders, map(rounded, _means(rows)), strict=True))

    found: dict[str, object] = {}
    for measure in _MEASURES:
        own = {task: rows[measure] for task, rows in sorted(tasks.items()) if measure in rows}
        if own:
            every = [one for rows in own.values() for one in rows]
            found[measure] = {"all": told(every), "tasks": {task: told(rows) for task, rows in own.items()}}
    return found
