"""What an optimizer knows, as named tensors, and back: moments, counts, and what its groups remember."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vlmix.core.errors import CheckpointError
from vlmix.train.parallel.pieces import Stored

# `key|parameter` is a tensor; `=key|parameter` and `=key|#place of a group` are Python numbers.
_NUMBER, _GROUP = "=", "#"


def state_tensors(named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """The whole state; ``named`` gives parameters their names.

    Raises:
        CheckpointError: if several processes divide a parameter and the optimizer does not divide its state.

    """
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                result[f"{_NUMBER}{key}|{name}"] = _number(value)
                continue
            if isinstance(parameter, DTensor) and value.ndim and not isinstance(value, DTensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key} of {name} in a form that several processes "
                    "cannot divide: choose another optimizer, or one process"
                )
            # Tables that all parameters look up are one tensor; a file holds each under its own name.
            result[f"{key}|{name}"] = value.clone() if id(value) in seen else value
            seen.add(id(value))
    remembered = _remembered(optimizer)
    return result | {
        f"{_NUMBER}{key}|{_GROUP}{place}": _number(group[key]) for place, group, key in remembered
    }


def load_state(stored: Stored, named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Give the optimizer the state that ``state_tensors`` told.

    Raises:
        CheckpointError: if the state is of parameters that do not train here.

    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name in sorted(stored.names):
        key, _, parameter = name.partition("|")
        if parameter.startswith(_GROUP):
            group = optimizer.param_groups[int(parameter.removeprefix(_GROUP))]
            group[key.removeprefix(_NUMBER)] = stored.read(name).item()
            continue
        if parameter not in named:
            raise CheckpointError(
                f"{stored.folder}: optimizer state of {parameter!r}, which this stage does not train"
            )
        owner = named[parameter]
        if key.startswith(_NUMBER):
            optimizer.state[owner][key.removeprefix(_NUMBER)] = stored.read(name).item()
        else:
            optimizer.state[owner][key] = _read(stored, name, owner, groups[owner])


def _read(stored: Stored, name: str, owner: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    shape, dtype = stored.shape(name), stored.dtype(name)
    if shape == tuple(owner.shape):
        value = torch.empty_like(owner.detach(), dtype=dtype)
    else:  # a count of steps is on the CPU, where AdamW itself keeps it unless it is fused
        beside = not name.startswith("step|") or group.get("fused", False)
        value = torch.empty(shape, dtype=dtype, device=owner.device if beside else "cpu")
    stored.fill(name, value)
    return value


def _remembered(optimizer: Optimizer) -> Iterator[tuple[int, Mapping[str, Any], str]]:
    for place, group in enumerate(optimizer.param_groups):
        for key in group.get("remembers", ()):
            yield place, group, key


def _number(value: float) -> Tensor:
    """Exactly: a count as int64, everything else as float64."""
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
