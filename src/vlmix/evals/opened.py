"""A model for another harness, from the arguments that it passes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from vlmix.core.errors import InputError, UnknownNameError
from vlmix.core.sample import Decoding
from vlmix.evals.responder import ModelResponder
from vlmix.models.loading import load

_KNOWN: Final = ("pretrained", "batch_size", "device", "max_batch_size")


def opened(arguments: Mapping[str, Any]) -> tuple[ModelResponder, Decoding]:
    """The model folder ``pretrained`` on ``device``, answering ``batch_size`` questions at once.

    The size may be text; one that the harness leaves to the model, such as ``auto``, is 64. What it says of
    ``max_batch_size`` has no part here: answers do not depend on the batch. Harnesses name an accelerator
    unless told otherwise; where there is none of that kind, the device is vlmix's own choice.

    Raises:
        UnknownNameError: if an argument is none of these.
        InputError: if ``pretrained`` is left out.
        CheckpointError: if there is no such model.

    """
    for name in arguments:
        if name not in _KNOWN:
            raise UnknownNameError("model argument", name, _KNOWN)
    if not arguments.get("pretrained"):
        raise InputError("name the model folder: --model_args pretrained=DIR")
    size = str(arguments.get("batch_size") or "")
    model, processor = load(str(arguments["pretrained"]), _device(arguments.get("device")))
    return ModelResponder(model, processor), Decoding(batch_size=int(size) if size.isdecimal() else 64)


def _device(named: str | None) -> torch.device | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    there = {"cpu"} if found is None else {"cpu", found.type}
    return torch.device(named) if named and torch.device(named).type in there else None
