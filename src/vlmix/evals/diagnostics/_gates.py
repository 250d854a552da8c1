"""Readers of gates: what weight a fusion gives each encoder on one question's views, and how much that adds.

Every reader knows one fusion, and listens to its modules while they run; nothing is computed in another way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.fusion._aggregation import JointLayer, SeparateLayer
from vlmix.fusion.deformable import Deformable
from vlmix.fusion.mixture_of_resolution import MixtureOfResolution
from vlmix.fusion.mixture_of_vision_experts import MixtureOfVisionExperts
from vlmix.fusion.patch_mining import PatchMining
from vlmix.fusion.spatial_aggregator import SpatialAggregator
from vlmix.moe.recorder_tally import choices_of

if TYPE_CHECKING:
    from vlmix.evals.diagnostics._looks import Seen

Heard = dict[str, tuple[tuple[Any, ...], Any]]
"""What modules were given and gave in one forward pass, by name."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One place where encoders are weighed: weights, and sizes ||g f|| of what each adds, both (V, E).

    Either is ``None`` where the fusion has no such thing there; NaN where an encoder takes no part.
    """

    place: str
    weights: Tensor | None
    sizes: Tensor | None


class GateReader(ABC):
    """Reads one kind of fusion, whose encoders promised ``specs``."""

    def __init__(self, fusion: Any, specs: Sequence[VisionSpec]) -> None:
        self.fusion, self.specs = fusion, specs

    def names(self) -> list[str]:
        """Modules of the fusion to listen to."""
        return []

    @abstractmethod
    def read(self, seen: Seen, heard: Heard) -> list[Gate]:
        """Every gate of the forward pass that ``seen`` and ``heard`` come from."""

    @contextmanager
    def listening(self) -> Generator[Heard]:
        """Hear the modules inside the ``with``; each one's last call counts."""
        heard: Heard = {}
        with ExitStack() as hooks:
            for name in self.names():
                module = cast("nn.Module", self.fusion.get_submodule(name))

                def hear(_: Any, given: Any, found: Any, name: str = name) -> None:
                    heard[name] = (given, found)

                hooks.callback(module.register_forward_hook(hear).remove)
            yield heard


class _VisionExperts(GateReader):
    def read(self, seen: Seen, heard: Heard) -> list[Gate]:
        """The decision that the fusion put on the tape, with the norms of each g_i f_i."""
        gates: list[Gate] = []
        for routing in seen.routing:
            if routing.layer == "fusion" and routing.norms is not None:
                sizes = torch.zeros_like(routing.logits).scatter(1, routing.indices, routing.norms)
                gates.append(Gate("router", choices_of(routing).weights, sizes))
        return gates


class _Resolution(GateReader):
    def names(self) -> list[str]:
        """Every adapter, and both sides of the sum at the end."""
        places = [f"adapters.{number}" for number in range(len(self.fusion.adapters))]
        return [
            *[f"{at}{part}" for at in places for part in ("", ".gate", ".fast_proj")],
            "fast_proj",
            "slow_proj",
        ]

    def read(self, seen: Seen, heard: Heard) -> list[Gate]:
        """tanh of every adapter's gate for the second encoder; the first one's weight is 1."""
        gates: list[Gate] = []
        for number, block in enumerate(self.fusion.after):
            at = f"adapters.{number}"
            (fast, _), found = heard[at]
            kept = fast.tokens + FeatureMap.from_nchw(heard[f"{at}.fast_proj"][1]).tokens
            gate_V1 = heard[f"{at}.gate"][1].float().tanh()
            weights = torch.cat((torch.ones_like(gate_V1), gate_V1), dim=1)
            gates.append(Gate(f"behind block {block}", weights, _sizes([kept, found - kept])))
        ends = [heard["fast_proj"][1], heard["slow_proj"][1]]
        return [*gates, Gate("sum at the end", None, _sizes(ends))]


class _Aggregator(GateReader):
    def names(self) -> list[str]:
        """Every layer with what weighs its cells or its readers."""
        found: list[str] = []
        for number, layer in enumerate(self.fusion.layers):
            at = f"layers.{number}"
            if isinstance(layer, JointLayer):
                found += [at, f"{at}.query", *(f"{at}.keys.{i}" for i in range(len(layer.keys)))]
            elif isinstance(layer, SeparateLayer):
                found += [f"{at}.weights", *(f"{at}.readers.{i}" for i in range(len(layer.readers)))]
        return found

    def read(self, seen: Seen, heard: Heard) -> list[Gate]:
        """The share of the attention that goes to each encoder's cells, or its weight among the readers."""
        return [
            self._joint(number, layer, heard)
            if isinstance(layer, JointLayer)
            else self._separate(number, heard)
            for number, layer in enumerate(self.fusion.layers)
        ]

    def _joint(self, number: int, layer: JointLayer, heard: Heard) -> Gate:
        at = f"layers.{number}"
        keys = [heard[f"{at}.keys.{i}"][1] for i in range(len(layer.keys))]
        masks = heard[at][0][3]
        query_INHD = heard[f"{at}.query"][1].unflatten(-1, (layer.heads, -1)).float()
        scores = [
            _scores(query_INHD, key.unflatten(-1, (layer.heads, -1)).float(), mask)
            for key, mask in zip(keys, masks, strict=True)
        ]
        weights_INHM = torch.cat(scores, dim=-1).softmax(-1)
        parts = weights_INHM.split([part.shape[-1] for part in scores], dim=-1)
        shares = torch.stack([part.sum(-1).mean((1, 2)) for part in parts], dim=1)
        return Gate(f"layer {number}: share of the attention", shares, None)

    def _separate(self, number: int, heard: Heard) -> Gate:
        at = f"layers.{number}"
        weights_INK = heard[f"{at}.weights"][1].float().softmax(-1)
        found = [heard[f"{at}.readers.{i}"][1].float() for i in range(weights_INK.shape[-1])]
        added = [x * g.unsqueeze(-1) for x, g in zip(found, weights_INK.unbind(-1), strict=True)]
        return Gate(f"layer {number}", weights_INK.mean(1), _sizes(added))


def _scores(query_INHD: Tensor, key_INMHD: Tensor, mask_INM: Tensor | None) -> Tensor:
    found = torch.einsum("inhd,inmhd->inhm", query_INHD, key_INMHD) * query_INHD.shape[-1] ** -0.5
    return found if mask_INM is None else found.masked_fill(~mask_INM.unsqueeze(2), -torch.inf)


class _Deformable(GateReader):
    def names(self) -> list[str]:
        """What weighs the points."""
        return ["attention.scores"]

    def read(self, seen: Seen, heard: Heard) -> list[Gate]:
        """The share of each other encoder among the points that are read, and what reading adds."""
        attention = self.fusion.attention
        scores_INEP = heard["attention.scores"][1].float().unflatten(-1, (attention.heads, -1))
        counts = [max(1, len(spec.levels)) if self.fusion.levels else 1 for spec in self.specs[1:]]
        parts = scores_INEP.softmax(-1).split([count * attention.points for count in counts], dim=-1)
        shares = [part.sum(-1).mean((1, 2)) for part in parts]
        nobody = torch.full_like(shares[0], torch.nan)
        gates = [Gate("share of the points", torch.stack([nobody, *shares], dim=1), None)]
        return gates + (_residual(seen) if len(counts) == 1 else [])


class _Mining(GateReader):
    def read(self, seen: Seen, heard: Heard) -> list[Gate]:
        """There is no gate; what mining adds beside the tokens it is added to."""
        return _residual(seen)


def _residual(seen: Seen) -> list[Gate]:
    first = cast("FeatureMap", seen.maps[0]).tokens
    return [Gate("added to the first encoder", None, _sizes([first, seen.fused - first]))]


def _sizes(parts: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of each part of every view: (V, E)."""
    return torch.stack([part.float().flatten(1).norm(dim=1) for part in parts], dim=1)


READERS: Final[tuple[tuple[type[nn.Module], type[GateReader]], ...]] = (
    (MixtureOfVisionExperts, _VisionExperts),
    (MixtureOfResolution, _Resolution),
    (SpatialAggregator, _Aggregator),
    (Deformable, _Deformable),
    (PatchMining, _Mining),
)


def reader_of(fusion: nn.Module, specs: Sequence[VisionSpec]) -> GateReader | None:
    """The reader of this fusion's gates, if it has any."""
    if isinstance(fusion, MixtureOfVisionExperts) and fusion.router is None:
        return None
    return next((reader(fusion, specs) for kind, reader in READERS if isinstance(fusion, kind)), None)
