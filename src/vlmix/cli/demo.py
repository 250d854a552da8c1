"""``vlmix demo``: the first five minutes."""

from __future__ import annotations

from pathlib import Path

import typer

from vlmix.cli.console import err, out

_PICTURE = "picture.png"


def demo(
    out_dir: Path = typer.Option(
        Path("runs/demo"), "--out", help="Run folder; an unfinished one is continued."
    ),
    overrides: list[str] = typer.Argument(
        None, help="Recipe settings to change, as key.path=value.", show_default=False
    ),
) -> None:
    """Train a small model with two eyes on pictures painted here, judge it, and ask it three questions.

    Needs no download and no GPU: about five minutes on two cores. The finished run folder is an ordinary
    one: look at report/report.html, and go on asking with `vlmix chat`.
    """
    from vlmix.train.recipe_file import load_recipe

    recipe = load_recipe("demo", overrides or [])

    from vlmix.cli.evaluate import show_results
    from vlmix.cli.flow import train_and_judge

    if (out_dir / "report" / "report.html").is_file():
        err().print(
            f"{out_dir} holds a finished demo; asking it again. Train anew with --out, or remove the folder."
        )
    else:
        show_results(train_and_judge(recipe, out_dir, resume=(out_dir / "recipe.yaml").is_file()))
    _ask(out_dir, recipe.model.image_size)


def _ask(folder: Path, image_size: int) -> None:
    """Paint a picture nobody trained on, ask three questions about it, and say how to go on."""
    from vlmix.cli.chat import ask
    from vlmix.core.sample import Decoding, ImageRef, Turn
    from vlmix.data.sources.synth import SynthSettings
    from vlmix.data.synth.exhibit import exhibit
    from vlmix.evals.responder import ModelResponder
    from vlmix.models.loading import load

    responder = ModelResponder(*load(folder))
    shown = exhibit(SynthSettings(image_size=image_size, difficulty=0).dial())
    path = folder / _PICTURE
    shown.image.save(path)
    console = out()
    console.print(f"\n[bold]picture[/]  {path}")
    for question, expected in shown.questions:
        answer = ask(responder, [Turn("user", (ImageRef(path), question))], Decoding(max_new_tokens=16))
        verdict = "[green]right[/]" if answer.strip() == expected else f"[red]it is {expected}[/]"
        console.print(f"  {question}  [bold]{answer}[/]  {verdict}")
    console.print(f"[bold]report[/]   {folder / 'report' / 'report.html'}")
    ask_on = f'vlmix chat {folder} --image {path} "{shown.questions[0][0]}"'
    console.print(f"[bold]ask on[/]   {ask_on}", soft_wrap=True)
