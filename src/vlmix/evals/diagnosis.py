"""A trained mixture examined: every diagnostic in turn, and a folder with what they found.

``diagnostics.json`` is for programs, ``diagnostics.html`` for people, and every figure is a PNG beside them.
No clock and no batch size is in them: the same model and questions give the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmix.core.errors import InputError
from vlmix.core.files import publish, write_bytes, write_json, write_text
from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Finding
from vlmix.evals.diagnostics._subject import Subject
from vlmix.evals.run import versions

SCHEMA = "vlmix.diagnostics/1"
_FOUND = "diagnostics.json"
_PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What every diagnostic found, by name, and why others say nothing about this model."""

    subject: Subject
    findings: Mapping[str, Finding]
    skipped: Mapping[str, str]


def check_diagnosis_folder(folder: Path) -> None:
    """Refuse to put findings where they would replace anything but older findings.

    Raises:
        InputError: if there is a file, or a folder that holds something else.

    """
    if not folder.exists() or (folder / _FOUND).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(
            f"{folder} exists and holds no {_FOUND}: a diagnosis replaces its whole folder. Choose a new one"
        )


def diagnose(subject: Subject, names: Sequence[str] = ()) -> Diagnosis:
    """Run the diagnostics of these names, or all; one that says nothing of such a model is skipped.

    Raises:
        UnknownNameError: if there is no such diagnostic.
        InputError: if no question can be asked, or shows a picture.

    """
    findings: dict[str, Finding] = {}
    skipped: dict[str, str] = {}
    for name in names or DIAGNOSTICS.names():
        diagnostic = DIAGNOSTICS.get(name)()
        if reason := diagnostic.obstacle(subject):
            skipped[name] = reason
        else:
            findings[name] = diagnostic.examine(subject)
    return Diagnosis(subject, findings, skipped)


def write_diagnosis(folder: Path, title: str, found: Diagnosis) -> Path:
    """Write the folder whole, replacing an older one, and return the page's path.

    Raises:
        InputError: if ``folder`` holds something else.
        DiskFullError: if there is no room; older findings are then unchanged.

    """
    check_diagnosis_folder(folder)
    page = _page(title, found)
    with publish(folder) as temporary:
        write_json(temporary / _FOUND, {"title": title, **_as_json(found)})
        for finding in found.findings.values():
            for figure in finding.figures:
                write_bytes(temporary / f"{figure.name}.png", figure.png)
        write_text(temporary / "diagnostics.html", page)
    return folder / "diagnostics.html"


def _as_json(found: Diagnosis) -> dict[str, Any]:
    asked = found.subject.answering.questions
    return {
        "schema": SCHEMA,
        "benchmark": asked.benchmark.settings.kind,
        "settings": asked.benchmark.settings.model_dump(mode="json"),
        "n": len(asked.samples),
        "seed": asked.seed,
        "encoders": found.subject.encoders,
        "fusion": found.subject.model.config.fusion_settings().model_dump(mode="json"),
        "findings": {
            name: {
                "title": finding.title,
                "cautions": list(finding.cautions),
                "figures": [f"{figure.name}.png" for figure in finding.figures],
                **finding.data,
            }
            for name, finding in found.findings.items()
        },
        "skipped": dict(found.skipped),
        "versions": versions(),
    }


def _page(title: str, found: Diagnosis) -> str:
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    asked = found.subject.answering.questions
    findings = [
        {
            "title": finding.title,
            "reading": finding.reading,
            "cautions": finding.cautions,
            "tables": finding.tables,
            "figures": [
                (base64.b64encode(figure.png).decode("ascii"), figure.caption) for figure in finding.figures
            ],
        }
        for finding in found.findings.values()
    ]
    page = environment.get_template("diagnostics.html.jinja").render(
        title=title,
        css=(_PAGE / "report.css").read_text(encoding="utf-8"),
        benchmark=asked.benchmark.settings.kind,
        questions=len(asked.samples),
        encoders=found.subject.encoders,
        findings=findings,
        skipped=found.skipped,
        versions=versions(),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a question must not stop it
