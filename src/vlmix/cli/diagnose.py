"""``vlmix diagnose``: what a trained mixture does with its encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from vlmix.cli.console import err, out
from vlmix.cli.wanted import RECIPE, changed, of_recipe
from vlmix.core.errors import InputError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.diagnostics import DIAGNOSTICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmix.evals.diagnosis import Diagnosis
    from vlmix.evals.diagnostics._base import Table as Found
    from vlmix.evals.diagnostics._subject import Answering, Questions


def diagnose(  # noqa: PLR0913, PLR0917 - each is an option of the command
    model: Path = typer.Argument(help="A model folder or a run folder."),
    benchmark: str = typer.Option(
        ..., "--benchmark", "-b", help="Whose questions the model is asked, and whose pictures it is shown."
    ),
    data: Path = typer.Option(None, "--data", help="Folder of the benchmark's data, where it needs one."),
    limit: int = typer.Option(None, "--limit", min=1, help="Ask only the first so many questions."),
    out_dir: Path = typer.Option(
        None, "--out", help="Folder for what is found; MODEL/diagnosis-BENCHMARK if left out."
    ),
    subsets: bool = typer.Option(
        False, "--subsets", help="Ask with every subset of the encoders (five at most): the dropout curves."
    ),
    against: list[Path] = typer.Option(
        [],
        "--against",
        help="Another model with the same encoders, for the dropout curves; several are possible.",
    ),
    only: str = typer.Option(
        "", "--only", help="Some diagnostics alone, separated by commas; `vlmix list diagnostics` names them."
    ),
    batch_size: int = typer.Option(64, "--batch-size", min=1, help="Questions answered at once."),
    settings: list[str] = typer.Option([], "--set", help="A benchmark setting as key=value, such as seed=7."),
) -> None:
    """Examine MODEL's encoders and write diagnostics.html, diagnostics.json and pictures.

    What each encoder is worth: the benchmark is asked once as it is and once without each encoder, whose map
    is then zero where it enters the fusion. Norm and effective rank of every map, how alike two encoders see
    (CKA), what the projector's columns, gates and routers make of each, and where patch mining looks.

        vlmix diagnose runs/two_eyes --benchmark synth_qa --limit 200
        vlmix diagnose runs/with --benchmark synth_qa --subsets --against runs/without

    **Masking an encoder is not retraining without it**: the figures are about this model as it is. A run
    folder is asked as its recipe has the benchmark under `evals`, but for --set, --data and --limit.
    """
    names = _known(only)
    raw, most = _asked(model, benchmark, data, settings)

    from vlmix.cli.asking import AskingProgress
    from vlmix.cli.flow import open_benchmark
    from vlmix.core.sample import Decoding
    from vlmix.evals.diagnosis import check_diagnosis_folder, write_diagnosis
    from vlmix.evals.diagnosis import diagnose as examine
    from vlmix.evals.diagnostics._subject import Questions, Subject

    target = out_dir or model / f"diagnosis-{benchmark}"
    check_diagnosis_folder(target)
    _check_alike(model, against)
    with AskingProgress(err()) as progress:
        decoding = Decoding(batch_size=batch_size)
        questions = Questions(open_benchmark(raw), limit or most, decoding, tell=progress.of(benchmark))
        others = {str(path): _opener(path, questions) for path in against}
        subject = Subject(_opener(model, questions)(), subsets=subsets, against=others)
        found = examine(subject, names)
    write_diagnosis(target, f"{model} on {benchmark}", found)
    _show(found)
    out().print(f"page  {target / 'diagnostics.html'}", markup=False, soft_wrap=True)


def _known(only: str) -> list[str]:
    """The diagnostics asked for; none stands for all."""
    names = [name for name in only.split(",") if name]
    for name in names:
        DIAGNOSTICS.get(name)
    return names


def _asked(
    model: Path, name: str, data: Path | None, settings: list[str]
) -> tuple[dict[str, object], int | None]:
    """Raw settings and limit of the benchmark: as the run's recipe has it, with what was given changed."""
    if name not in BENCHMARKS.names():
        BENCHMARKS.get(name)
    judged = of_recipe(model / RECIPE) if (model / RECIPE).is_file() else []
    own = (row for row in judged if row[0]["kind"] == name)
    found: tuple[dict[str, object], int | None] = next(own, ({"kind": name}, None))
    return changed(found[0], data, settings), found[1]


def _check_alike(model: Path, against: list[Path]) -> None:
    """Refuse models with other encoders before anything is asked, which may take hours."""
    from vlmix.models.configuration import VlmixConfig
    from vlmix.models.loading import model_folder

    def kinds(path: Path) -> list[str]:
        found = VlmixConfig.get_config_dict(model_folder(path))[0].get("encoders") or []
        return [str(part["kind"]) for part in found]

    own = kinds(model)
    for path in against:
        if kinds(path) != own:
            raise InputError(
                f"--against {path}: its encoders are {kinds(path)}, those of {model} are {own}; subsets can "
                "be compared of the same encoders alone"
            )


def _opener(path: Path, questions: Questions) -> Callable[[], Answering]:
    """What loads a model when it is needed, and not before."""

    def opened() -> Answering:
        from vlmix.evals.diagnostics._subject import Answering
        from vlmix.models.loading import load, model_folder

        return Answering(str(path), *load(model_folder(path)), questions)

    return opened


def _show(found: Diagnosis) -> None:
    for finding in found.findings.values():
        out().print(finding.title, style="bold", markup=False)
        for sentence in (*finding.reading, *finding.cautions):
            out().print(sentence, style="dim", markup=False)
        for table in finding.tables:
            out().print(_table(table))
        out().print()
    for name, reason in found.skipped.items():
        out().print(f"{name}: {reason}", style="dim", markup=False, soft_wrap=True)


def _table(found: Found) -> Table:
    table = Table(title=Text(found.title), title_justify="left", box=None)
    for number, name in enumerate(found.columns):
        table.add_column(Text(name), justify="right" if number else "left")
    for row in found.rows:
        table.add_row(*map(Text, row))
    return table
