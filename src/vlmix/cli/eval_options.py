"""The options of ``vlmix eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A model folder, a run folder, or the address of a server that speaks OpenAI's chat "
        "completions, such as http://localhost:8000/v1.",
        show_default=False,
    ),
]
BenchmarkOption = Annotated[
    str,
    typer.Option(
        "--benchmark",
        "-b",
        help="One name or several, separated by commas; those of the run's recipe if left out.",
        show_default=False,
    ),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of the benchmark's data, where it needs one.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Ask only the first so many questions.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Report folder; MODEL/report-BENCHMARK if left out.")
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Questions answered at once: 64, or 8 of a server. The answers are the same for any.",
        show_default=False,
    ),
]
SettingsOption = Annotated[
    list[str], typer.Option("--set", help="A benchmark setting as key=value, such as seed=7.")
]
ChooseOption = Annotated[
    str,
    typer.Option(
        "--choose",
        help="How questions with options are answered: text (in words), likelihood (the likeliest option) "
        "or mean_likelihood (the likeliest by the token).",
    ),
]
RoutingOption = Annotated[
    bool,
    typer.Option(
        "--routing",
        help="Watch the experts while they answer: adds their load, paths, pictures of who sees which "
        "patch, and a verdict to the report, and writes routing.json.",
    ),
]
FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Judge the answers of this file instead of a model's: rows with question_id and text.",
        show_default=False,
    ),
]
ModelNameOption = Annotated[str, typer.Option("--model-name", help="The model's name at the server.")]
KeyOption = Annotated[
    str, typer.Option("--key-variable", help="The environment variable that holds the server's key.")
]
