"""Routing of one forward pass, and the instruction that its parts may ask for.

Both are bound to the running code, not kept in modules: parts inside any model find them without a change to
its forward pass, and a layer that is run once more for its gradients (outside ``recording``) adds nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from torch import Tensor

from vlmix.core.tensors import Routing

_TAPE: Final[ContextVar[list[Routing] | None]] = ContextVar("tape", default=None)
_INSTRUCTION: Final[ContextVar[Tensor | None]] = ContextVar("instruction", default=None)


@contextmanager
def recording() -> Generator[list[Routing]]:
    """Collect the routing of every part that runs inside the ``with``, in order.

    Recordings may lie inside one another; the outer one gets what the inner one has.
    """
    outer, tape = _TAPE.get(), list[Routing]()
    token = _TAPE.set(tape)
    try:
        yield tape
    finally:
        _TAPE.reset(token)
        if outer is not None:
            outer.extend(tape)


@contextmanager
def unrecorded() -> Generator[list[Routing]]:
    """Keep the routing of what runs inside the ``with`` out of every recording; it is given here alone."""
    tape = list[Routing]()
    token = _TAPE.set(tape)
    try:
        yield tape
    finally:
        _TAPE.reset(token)


def record(routing: Routing) -> None:
    """Add one part's routing to the recording, if there is one."""
    tape = _TAPE.get()
    if tape is not None:
        tape.append(routing)


@contextmanager
def instructed(instruction_BD: Tensor | None) -> Generator[None]:
    """Let parts that run inside the ``with`` read this instruction, one vector for each row."""
    token = _INSTRUCTION.set(instruction_BD)
    try:
        yield
    finally:
        _INSTRUCTION.reset(token)


def instruction() -> Tensor | None:
    """The instruction of the running forward pass (B, D), if it has one."""
    return _INSTRUCTION.get()
