"""Feed-forward networks found by what they compute, in any model, also without weights (meta device).

A module is one if its forward pass, traced, is ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``, with
gate and up in two Linears or in one; dropout may follow. Names play no part.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from transformers.pytorch_utils import Conv1D

_FUNCTIONS: Final = {F.silu: nn.SiLU, F.relu: nn.ReLU, torch.relu: nn.ReLU}
# What fx, and the modules it traces, raise about a forward pass that it cannot follow.
_UNTRACEABLE: Final = (TraceError, TypeError, ValueError, AttributeError, RuntimeError, KeyError)
_LINEAR, _ACTIVE = r"L\[(?P<{}>[^\]]*)\]\({}\)", r"A\[(?P<act>[^\]]*)\]\({}\)"
_HALF: Final = r"H(?P<{}>[01])\(L\[(?P<{}>[^\]]*)\]\(x\)\)"
_INNER: Final = {
    "plain": _ACTIVE.format(_LINEAR.format("up", "x")),
    "gated": _ACTIVE.format(_LINEAR.format("gate", "x")) + r"\*" + _LINEAR.format("up", "x"),
    "packed": _ACTIVE.format(_HALF.format("first", "up")) + r"\*" + _HALF.format("second", "same"),
}
_FORMULAS: Final = {kind: re.compile(_LINEAR.format("down", inner)) for kind, inner in _INNER.items()}


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A feed-forward network: its Linears by name, and what stands between them.

    With ``packed`` the Linear ``up`` holds gate and up, the gate's rows first or last. ``dropout`` follows.
    """

    up: str
    down: str
    activation: nn.Module
    gate: str | None = None
    packed: str | None = None
    dropout: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether an activated gate multiplies the inner values."""
        return self.gate is not None or self.packed is not None


def feed_forwards(root: nn.Module) -> dict[str, FeedForward]:
    """Every feed-forward network below ``root``, itself included, by name, in the order of its modules."""
    found: dict[str, FeedForward] = {}
    for name, module in root.named_modules():
        inside = any(not above or name.startswith(f"{above}.") for above in found)
        if not inside and _may_be(module) and (network := feed_forward(module)) is not None:
            found[name] = network
    return found


def feed_forward(module: nn.Module) -> FeedForward | None:
    """How ``module`` is built, if it is a feed-forward network."""
    reader = _Reader(module)
    try:
        formula = reader.read(_Tracer().trace(module))
    except _UNTRACEABLE:
        return None
    for kind, pattern in _FORMULAS.items():
        if match := pattern.fullmatch(formula):
            return _described(kind, match, reader)
    return None


def _described(kind: str, match: re.Match[str], reader: _Reader) -> FeedForward | None:
    gate = match["gate"] if kind == "gated" else None
    packed = None
    if kind == "packed":
        if match["up"] != match["same"] or match["first"] == match["second"]:
            return None
        packed = "first" if match["first"] == "0" else "last"
    activation = reader.activations[match["act"]]
    return FeedForward(match["up"], match["down"], activation, gate, packed, reader.dropout)


def linear_weight(linear: nn.Module) -> Tensor:
    """Its weight as (outputs, inputs), also that of GPT-2's Linears, which keep the transpose."""
    weight = cast("Tensor", linear.weight)
    return weight.T if isinstance(linear, Conv1D) else weight


def _may_be(module: nn.Module) -> bool:
    linears = sum(isinstance(below, nn.Linear | Conv1D) for below in module.modules())
    return linears in (2, 3) and not isinstance(module, nn.ModuleList | nn.ModuleDict)


class _Tracer(fx.Tracer):
    """Follows the network itself and containers in it, and into nothing else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)


class _Reader:
    """A traced forward pass as a formula: ``L[name](x)`` a Linear, ``A[…]`` an activation, ``H0`` a half."""

    def __init__(self, root: nn.Module) -> None:
        self.root, self.activations, self.dropout = root, dict[str, nn.Module](), 0.0

    def read(self, graph: fx.Graph) -> str:
        formulas: dict[Any, str] = {}
        for node in graph.nodes:
            if node.op == "output":
                return formulas[node.args[0]]
            formulas[node] = self._formula(node, formulas)
        raise ValueError("a graph without output")

    def _formula(self, node: fx.Node, known: dict[Any, str]) -> str:
        if node.op == "placeholder":
            if known:
                raise ValueError("a network reads one tensor")
            return "x"
        inputs = [known[argument] for argument in node.args if isinstance(argument, fx.Node)]
        if node.op == "call_module":
            return self._module(str(node.target), inputs[0])
        if node.target is F.dropout:
            return self._dropped(float(cast("Any", node.kwargs.get("p", 0.5))), inputs[0])
        return self._joined(node, inputs)

    def _joined(self, node: fx.Node, inputs: list[str]) -> str:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if name == "mul":
            active, other = sorted(inputs)  # "A[…" sorts before "H…" and "L[…"
            return f"{active}*{other}"
        if name == "chunk" and _halves(node):
            return f"C{inputs[0]}"
        if node.target is operator.getitem and inputs[0].startswith("C"):
            return f"H{node.args[1]}({inputs[0][1:]})"
        return f"A[{self._function(node)}]({inputs[0]})"

    def _module(self, target: str, read: str) -> str:
        module = self.root.get_submodule(target)
        if isinstance(module, nn.Linear | Conv1D):
            return f"L[{target}]({read})"
        if isinstance(module, nn.Identity | nn.Dropout):
            return self._dropped(module.p if isinstance(module, nn.Dropout) else 0.0, read)
        if any(True for _ in module.parameters()):
            raise ValueError(f"{target} has weights of its own")
        self.activations[target] = module
        return f"A[{target}]({read})"

    def _dropped(self, share: float, read: str) -> str:
        if share and not read.startswith("L["):
            raise ValueError("dropout inside the network")
        self.dropout = share or self.dropout
        return read

    def _function(self, node: fx.Node) -> str:
        name = f"function_{len(self.activations)}"
        if node.target is F.gelu:
            made: nn.Module = nn.GELU(str(node.kwargs.get("approximate", "none")))
        else:
            made = _FUNCTIONS[cast("Any", node.target)]()
        self.activations[name] = made
        return name


def _halves(node: fx.Node) -> bool:
    parts, dim = (*node.args[1:], None, None)[:2]
    return (parts or node.kwargs.get("chunks"), dim or node.kwargs.get("dim")) == (2, -1)
