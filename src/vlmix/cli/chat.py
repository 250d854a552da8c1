"""``vlmix chat``: ask a model about pictures, once or in a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlmix.cli.console import err, out
from vlmix.core.errors import InputError, VlmixError
from vlmix.core.sample import Decoding, ImageRef, Sample, Turn

if TYPE_CHECKING:
    from vlmix.evals.responder import ModelResponder

_HELP = "/image PATH adds a picture, /new starts over, /quit leaves."


def chat(
    model: Path = typer.Argument(help="A model folder or a run folder."),
    question: str = typer.Argument(
        "", help="Ask this, print the answer and leave. Without it, a conversation."
    ),
    image: list[Path] = typer.Option([], "--image", "-i", help="A picture to ask about; may be repeated."),
    max_new_tokens: int = typer.Option(256, "--max-new-tokens", min=1, help="Longest answer."),
) -> None:
    """Ask MODEL about pictures. With a question, the answer alone goes to standard output."""
    pictures = [open_picture(path) for path in image]

    from vlmix.evals.responder import ModelResponder
    from vlmix.models.loading import load

    responder = ModelResponder(*load(model))
    decoding = Decoding(max_new_tokens=max_new_tokens, batch_size=1)
    if question:
        out().print(ask(responder, [Turn("user", (*pictures, question))], decoding), markup=False)
        return
    if not sys.stdin.isatty():
        raise InputError('no question: give one, as in `vlmix chat MODEL --image PATH "What is this?"`')
    _converse(responder, pictures, decoding)


def open_picture(path: Path) -> ImageRef:
    """A picture that is known to open.

    Raises:
        ImageError: if it does not.

    """
    picture = ImageRef(path)
    picture.open()
    return picture


def ask(responder: ModelResponder, turns: list[Turn], decoding: Decoding) -> str:
    """The model's answer to a conversation that ends with a user turn.

    Raises:
        InputError: if it cannot be asked.

    """
    answer = next(iter(responder.respond([Sample("chat", tuple(turns))], decoding)))
    if answer.error:
        raise InputError(answer.error)
    return answer.text


def _converse(responder: ModelResponder, pictures: list[ImageRef], decoding: Decoding) -> None:
    """Read questions until the end of input; a failed one is told and forgotten."""
    err().print(_HELP, style="dim")
    turns: list[Turn] = []
    while True:
        try:
            line = err().input("[bold]you[/]> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in {"/quit", "/exit"}:
            return
        try:
            if line == "/new":
                turns, pictures = [], []
            elif line.startswith("/image "):
                pictures = [*pictures, open_picture(Path(line.removeprefix("/image ").strip()).expanduser())]
            elif line.startswith("/"):
                err().print(_HELP, style="dim")
            elif line:
                asked = [*turns, Turn("user", (*pictures, line))]
                answer = ask(responder, asked, decoding)
                out().print(answer, markup=False)
                turns, pictures = [*asked, Turn("assistant", (answer,))], []
        except VlmixError as error:
            err().print(str(error), style="red", markup=False)
