"""Which parameters a stage trains: globs over names become optimizer groups and a table to look at."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich.table import Table
from rich.text import Text
from torch import nn

from vlmix.core.errors import RecipeError
from vlmix.train.depth import rate_factors


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``learning_rate`` is ``None`` for what is frozen.

    With layer-wise decay ``learning_rate`` is the highest of the glob and ``lowest`` the lowest.
    """

    pattern: str
    learning_rate: float | None
    tensors: int
    parameters: int
    lowest: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that one glob trains at one learning rate, decayed or not; named as in ``short_names``."""

    pattern: str
    learning_rate: float
    decay: bool
    parameters: Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a stage trains: optimizer groups, and rows for the table with the frozen rest last."""

    groups: tuple[Group, ...]
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters.items()}


def short_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that globs see: without the leading ``model.``; tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.removeprefix("model."): parameter for name, parameter in named}


def matching(model: nn.Module, patterns: Iterable[str], where: str) -> dict[str, nn.Parameter]:
    """The parameters that any of the globs match, each once, by name.

    Raises:
        RecipeError: if a glob matches nothing; starts with ``where`` and names near ones.

    """
    names = short_names(model)
    found: dict[int, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise RecipeError(f"{where}: {pattern!r} matches no parameter.{_near(pattern, names)}")
        for name in matched:
            found.setdefault(id(names[name]), name)
    return {name: names[name] for name in found.values()}


def select(
    model: nn.Module, train: Mapping[str, float], layer_decay: float | Mapping[str, float] = 1.0
) -> Selection:
    """Make trainable what the globs of ``train`` match and freeze the rest.

    The last glob that matches a parameter decides its learning rate. Norms, biases (stacked ones too) and
    other one-dimensional parameters are put into groups without weight decay. ``layer_decay`` lowers rates
    from layer to layer, see ``rate_factors``.

    Raises:
        RecipeError: if a glob matches nothing, or only what later globs take over.

    """
    names = short_names(model)
    factors = rate_factors(model, layer_decay, names) if layer_decay != 1.0 else {}
    owner = {id(p): pattern for pattern in train for p in matching(model, [pattern], "train").values()}
    members: dict[str, dict[str, nn.Parameter]] = {pattern: {} for pattern in train}
    frozen: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in names.items():
        pattern = owner.get(id(parameter))
        parameter.requires_grad_(pattern is not None)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            if pattern is None:
                frozen[id(parameter)] = parameter
            else:
                members[pattern][name] = parameter
    for pattern, parameters in members.items():
        if not parameters:
            raise RecipeError(
                f"train: everything {pattern!r} matches is taken over by later globs; remove it"
            )
    rows = [_row(pattern, rate, members[pattern].values(), factors) for pattern, rate in train.items()]
    groups = [
        group
        for pattern, rate in train.items()
        for group in _groups(pattern, rate, members[pattern], factors)
    ]
    return Selection(tuple(groups), (*rows, _row("frozen", None, frozen.values(), {})))


def set_modes(module: nn.Module) -> None:
    """Put ``module`` in training mode, and every part of it whose parameters are all frozen in eval mode."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        set_modes(child)


def table(selection: Selection, stage: str) -> Table:
    """The trainable parameters of ``stage`` as a table for the terminal."""
    result = Table(title=f"stage {stage}: what trains", title_justify="left")
    result.add_column("parameters")
    for heading in ("learning rate", "tensors", "numbers"):
        result.add_column(heading, justify="right")
    for row in selection.rows:
        rate = "-" if row.learning_rate is None else f"{row.learning_rate:g}"
        if row.lowest is not None:
            rate = f"{row.lowest:.3g} to {rate}"
        result.add_row(Text(row.pattern), rate, f"{row.tensors:,}", f"{row.parameters:,}")
    return result


def _near(pattern: str, names: Iterable[str]) -> str:
    """A sentence with the parameter names, or beginnings of names, nearest to a glob."""
    steps = pattern.rstrip("*").rstrip(".").count(".") + 1
    heads = sorted({".".join(name.split(".")[:steps]) for name in names})
    close = difflib.get_close_matches(pattern.rstrip("*").rstrip("."), heads, n=3, cutoff=0.4)
    known = sorted({name.partition(".")[0] for name in names})
    near = f" Near it: {', '.join(head + '*' for head in close)}." if close else ""
    return f"{near} Names start with {', '.join(known)}"


def _groups(
    pattern: str, rate: float, members: Mapping[str, nn.Parameter], factors: Mapping[int, float]
) -> list[Group]:
    """The groups of one glob: by learning rate, highest first, and decayed or not."""
    found = {name: factors.get(id(parameter), 1.0) for name, parameter in members.items()}
    return [
        Group(pattern, rate * factor, decay, chosen)
        for factor in sorted({*found.values()}, reverse=True)
        for decay in (True, False)
        if (chosen := {n: p for n, p in members.items() if found[n] == factor and _decays(n, p) == decay})
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Not so for one-dimensional ones, nor for the biases of experts, which are stacked to matrices."""
    return parameter.ndim > 1 and not name.endswith("bias")


def _row(
    pattern: str, rate: float | None, parameters: Iterable[nn.Parameter], factors: Mapping[int, float]
) -> Row:
    chosen = list(parameters)
    size = sum(parameter.numel() for parameter in chosen)
    found = {factors.get(id(parameter), 1.0) for parameter in chosen}
    if rate is None or found <= {1.0}:
        return Row(pattern, rate, len(chosen), size)
    return Row(pattern, rate * max(found), len(chosen), size, rate * min(found))
