"""The options that name a judging model, for every command whose rules need one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmix.core.errors import InputError

if TYPE_CHECKING:
    from vlmix.evals.judges.settings import JudgeSettings

JUDGE_HELP = (
    "Who marks the answers, where a rule needs a judge: the address of a server that speaks OpenAI's chat "
    "completions, a cassette of its replies, or both (give it twice), which records what is new."
)
JudgeOption = Annotated[list[str], typer.Option("--judge", help=JUDGE_HELP, show_default=False)]
JudgeModelOption = Annotated[str, typer.Option("--judge-model", help="The judge's name at its server.")]
JudgeKeyOption = Annotated[
    str,
    typer.Option("--judge-key-variable", help="The environment variable that holds the judge's key."),
]
JudgeRulesOption = Annotated[
    Path | None,
    typer.Option(
        "--judge-rules",
        help="A file with the words to the judge: MM-Vet's prompt as text, LLaVA's rule.json.",
        show_default=False,
    ),
]
KEY_VARIABLE = "OPENAI_API_KEY"


def judge_of(places: Sequence[str], model: str, key_variable: str) -> JudgeSettings | None:
    """The judge that the options name, if they name one.

    Raises:
        InputError: if a model is named without a judge or the other way round, or two servers or cassettes.

    """
    if not places:
        if model:
            raise InputError("--judge-model names a judging model; say with --judge where it is")
        return None
    if not model:
        raise InputError(f"--judge {places[0]}: say with --judge-model which model is, or was, asked there")
    from vlmix.core.settings import read_settings
    from vlmix.evals.judges.settings import JudgeSettings

    urls = [place for place in places if place.startswith(("http://", "https://"))]
    cassettes = [place for place in places if place not in urls]
    if len(urls) > 1 or len(cassettes) > 1:
        raise InputError("--judge takes one server and one cassette at most")
    raw: dict[str, object] = {"model": model}
    if urls:
        raw["server"] = {"url": urls[0], "model": model, "key_variable": key_variable}
    if cassettes:
        raw["cassette"] = cassettes[0]
    return read_settings(JudgeSettings, raw, "--judge")


def with_judge(
    raws: Sequence[dict[str, Any]], judge: JudgeSettings | None, rules: Path | None
) -> list[dict[str, Any]]:
    """Raw settings of benchmarks, those that can have a judge with this one.

    Raises:
        InputError: if there is a judge, or rules for one, and no benchmark that can have it.

    """
    given = {"judge": judge.model_dump(mode="json")} if judge is not None else {}
    given |= {"rules": str(rules)} if rules is not None else {}
    if not given:
        return list(raws)
    from vlmix.core.parts import BENCHMARKS
    from vlmix.evals.benchmarks._judged import JudgedSettings

    fit = [issubclass(BENCHMARKS.get(raw["kind"]).settings_class, JudgedSettings) for raw in raws]
    if not any(fit):
        raise InputError(f"--judge: no judge marks {', '.join(str(raw['kind']) for raw in raws)}")
    return [{**raw, **given} if own else raw for raw, own in zip(raws, fit, strict=True)]
