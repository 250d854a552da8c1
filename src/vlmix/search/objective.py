"""What a search maximises: a formula over scores and cost, read without running any of its text. No torch."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vlmix.core.errors import RecipeError, suggestion

COSTS: Final = {
    "flops": "FLOPs to read a prompt of one picture and 64 tokens of text",
    "tokens": "visual tokens of one picture",
    "parameters": "parameters of the whole model",
    "seconds": "measured seconds of training and judging, without what other trials had made",
}
"""What ``cost.NAME`` may be."""
_LONGEST: Final = 2000
_OPERATORS: Final[Mapping[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
_SIGNS: Final[Mapping[type[ast.unaryop], float]] = {ast.UAdd: 1.0, ast.USub: -1.0}
_Known = Mapping[str, float]
_Term = Callable[[_Known], float]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


_FUNCTIONS: Final[Mapping[str, tuple[Callable[[Sequence[float]], float], range]]] = {
    "min": (min, range(2, 1000)),
    "max": (max, range(2, 1000)),
    "mean": (_mean, range(1, 1000)),
    "log": (lambda values: math.log(values[0]), range(1, 2)),
}
_ALLOWED: Final = "names with dots, numbers, + - * / ( ) and the functions " + ", ".join(_FUNCTIONS)


@dataclass(frozen=True, slots=True)
class Objective:
    """A formula that was read; ``names`` are what it looks up."""

    text: str
    names: frozenset[str]
    term: _Term

    def value(self, known: Mapping[str, float]) -> float:
        """What the formula gives for these figures; more is better.

        Raises:
            RecipeError: if a name is not among them, or there is no finite number.

        """
        check_names(self, known)
        try:
            found = self.term(known)
        except (ArithmeticError, ValueError) as error:
            told = ", ".join(f"{name} = {known[name]:g}" for name in sorted(self.names))
            raise RecipeError(f"objective: {self.text} has no value ({error}) where {told}") from None
        if not math.isfinite(found):
            raise RecipeError(f"objective: {self.text} is {found}, not a finite number")
        return found


def read_objective(text: str) -> Objective:
    """Read a formula.

    Raises:
        RecipeError: if it holds anything but names, numbers, the four operations and the known functions.

    """
    if len(text) > _LONGEST:
        raise RecipeError(f"objective: {len(text)} characters; {_LONGEST} are the most")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        names: set[str] = set()
        term = _read(tree.body, names)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        told = error.msg if isinstance(error, SyntaxError) else error
        raise RecipeError(f"objective: {text!r} is not a formula ({told}). Allowed are {_ALLOWED}") from None
    if not names:
        raise RecipeError(f"objective: {text!r} names no score, such as synth_qa.accuracy, and no cost")
    return Objective(text.strip(), frozenset(names), term)


def check_names(objective: Objective, known: Collection[str]) -> None:
    """Refuse a formula that looks up what is not known.

    Raises:
        RecipeError: with the known names and the nearest one.

    """
    for name in sorted(objective.names):
        if name not in known:
            raise RecipeError(
                f"objective: nothing is called {name!r}.{suggestion(name, known)} "
                f"Known: {', '.join(sorted(known))}"
            )


def check_sources(objective: Objective, benchmarks: Collection[str]) -> None:
    """Refuse, before anything is trained, names that no benchmark of these and no cost can give.

    Raises:
        RecipeError: with what a name may begin with.

    """
    costs = {f"cost.{name}" for name in COSTS}
    for name in sorted(objective.names):
        first, dot, rest = name.partition(".")
        if first == "cost" and name not in costs:
            raise RecipeError(f"objective: no cost {name!r}.{suggestion(name, costs)} Known: {sorted(costs)}")
        if first != "cost" and (first not in benchmarks or not dot or not rest):
            begins = [*(f"{known}.FIGURE" for known in sorted(benchmarks)), *sorted(costs)]
            raise RecipeError(
                f"objective: {name!r} is no figure of a benchmark that the recipe judges by, and no cost."
                f"{suggestion(first, benchmarks)} Known: {', '.join(begins)}"
            )


def _read(node: ast.expr, names: set[str]) -> _Term:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        apply, left, right = _OPERATORS[type(node.op)], _read(node.left, names), _read(node.right, names)
        return lambda known: apply(left(known), right(known))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        sign, inner = _SIGNS[type(node.op)], _read(node.operand, names)
        return lambda known: sign * inner(known)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return _number(node.value)
    if isinstance(node, ast.Name | ast.Attribute):
        name = _dotted(node)
        names.add(name)
        return lambda known: float(known[name])
    if isinstance(node, ast.Call):
        return _call(node, names)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed")


def _number(value: float) -> _Term:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")  # noqa: TRY004  (the reader turns it into its own error)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return lambda _: number


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError(f"{ast.unparse(node)!r} is no name")


def _call(node: ast.Call, names: set[str]) -> _Term:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in _FUNCTIONS:
        raise ValueError(f"no function {name!r}.{suggestion(name, _FUNCTIONS)}")
    apply, counts = _FUNCTIONS[name]
    if node.keywords or any(isinstance(each, ast.Starred) for each in node.args):
        raise ValueError(f"{name} takes plain values")
    if len(node.args) not in counts:
        most = "" if counts.stop > 2 else " and no more"
        raise ValueError(f"{name} takes {counts.start} value{'s' * (counts.start > 1)}{most}")
    inner = [_read(each, names) for each in node.args]
    return lambda known: apply([term(known) for term in inner])
