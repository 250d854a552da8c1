"""Packages that vlmix does without until something that needs them is asked for. No torch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from vlmix.core.errors import InputError


@contextmanager
def extra(name: str, what: str) -> Generator[None]:
    """Import inside this a package of the extra ``name``, which ``what`` needs.

    Raises:
        InputError: if the package is not installed; says how to install it.

    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs the extra `{name}`: pip install 'vlmix[{name}]' ({error})") from None
