"""Every error vlmix raises on purpose, and the exit code the command line gives for it.

VlmixError                 1  something failed
├── InputError             2  a flag, recipe, prompt, picture or file is wrong; nothing was written
│   ├── UnknownNameError      a name no part, recipe or setting has
│   ├── RecipeError           a recipe that does not fit its schema
│   ├── PlanError             settings that cannot work together, found before any weight exists
│   ├── ImageError            a picture that is missing, refused or unreadable
│   ├── ImageCountError       more or fewer pictures than placeholders
│   ├── ContextLengthError    a conversation longer than the context
│   ├── SampleError           one row of a data set that cannot be used
│   └── CheckpointError       a model or run folder that is incomplete, changed or of another kind
├── DataError              1  too many bad rows to go on
├── NonFiniteError         3  a loss or gradient that is not a finite number
├── SpikeError             3  losses or gradients that stand out from those before, where a recipe says stop
├── JudgeError             1  a judging model that gave no reply
├── DiskFullError          4  no space left to save
├── RunLockedError         5  another process is using the run folder
└── InterruptedRunError  130  stopped by a signal after saving; the run can be resumed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar, Literal

Fault = Literal["malformed", "missing", "placeholders"]


class VlmixError(Exception):
    """The root of the tree: catch this to catch everything vlmix raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(VlmixError):
    """What the user gave cannot be used; nothing was written."""

    exit_code: ClassVar[int] = 2


class UnknownNameError(InputError, LookupError):
    """A name that nothing has; the message offers the nearest one that exists."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(f"no {what} called {name!r}.{suggestion(name, names)} Known: {', '.join(names)}")


class RecipeError(InputError):
    """A recipe or override that does not fit the schema; names the key and the nearest known one."""


class PlanError(InputError):
    """Settings that contradict each other, found by arithmetic before any weight exists."""


class ImageError(InputError):
    """A picture that is missing, of a refused kind, too large or unreadable."""


class ImageCountError(InputError):
    """A prompt whose placeholders and pictures differ in number."""


class ContextLengthError(InputError):
    """A conversation that does not fit the context even after whole turns were dropped."""


class SampleError(InputError):
    """One row of a data set that cannot be used; ``line`` counts from 1 in its file.

    ``fault`` says of what kind: a picture is not there, pictures and placeholders differ in number, or the
    row itself is not what it should be.
    """

    def __init__(
        self, reason: str, *, line: int | None = None, sample_id: str = "", fault: Fault = "malformed"
    ) -> None:
        super().__init__(reason)
        self.reason, self.line, self.sample_id = reason, line, sample_id
        self.fault: Fault = fault


class CheckpointError(InputError):
    """A model or run folder that is incomplete, was changed, or is of another kind."""


class DataError(VlmixError):
    """Too large a share of a data set is bad to go on honestly."""


class NonFiniteError(VlmixError):
    """A loss or gradient is not a finite number; raised before the weights are changed."""

    exit_code: ClassVar[int] = 3


class SpikeError(VlmixError):
    """A loss or gradient stands out from those before; raised before the weights are changed."""

    exit_code: ClassVar[int] = 3


class JudgeError(VlmixError):
    """A judging model gave no reply; the answer that it was to mark counts as failed."""


class DiskFullError(VlmixError):
    """No space left to save; the previous checkpoint is intact."""

    exit_code: ClassVar[int] = 4


class RunLockedError(VlmixError):
    """Another process is using the run folder."""

    exit_code: ClassVar[int] = 5


class InterruptedRunError(VlmixError):
    """A signal asked the run to stop; it was saved and can be resumed."""

    exit_code: ClassVar[int] = 130


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
