"""A window into routing: who was sent where, counted batch by batch in memory that does not grow with them.

Feed it the ``routing`` of every forward pass, in training or evaluation; add up those of several processes
with ``merge``. It says what routers chose, not what that means: an expert's number is a place in a layer's
list, and nothing makes expert 1 of one layer alike to expert 1 of another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from vlmix.core.errors import VlmixError
from vlmix.core.tensors import Routing
from vlmix.moe.balance import Positions
from vlmix.moe.install import DECODER, expert_layers
from vlmix.moe.recorder_paths import CAPACITY, PathCounter
from vlmix.moe.recorder_tally import GROUPS, Choices, Tally, choices_of

SCHEMA: Final = "vlmix.routing/1"
_VISUAL, _TEXT, _WHOLE = range(len(GROUPS))
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Note:
    """One layer: its mixture's number, what part of the model it stands in, its experts and how many are met.

    ``whole`` layers decide once for a whole row or picture.
    """

    name: str
    mixture: int
    place: str
    experts: int
    k: int
    whole: bool


def notes_of(model: nn.Module) -> list[Note]:
    """What is to be known about every expert layer of a model, in order; empty if it has none."""
    mixtures: dict[int, int] = {}
    return [
        Note(
            layer.name,
            # The layers of one mixture share one settings object.
            mixtures.setdefault(id(layer.settings), len(mixtures)),
            layer.settings.place,
            layer.router_experts,
            layer.chosen,
            layer.settings.scope == "instance",
        )
        for layer in expert_layers(model)
    ]


class RoutingRecorder:
    """Sums of every layer, and the paths of every mixture.

    ``paths[mixture][group]`` counts the first choices of a token over the mixture's layers, such as
    ``0>3>1``; ``sets`` all its choices, such as ``0+2>1+3>0+1``; ``-`` stands where no expert took it. A
    mixture in ``pathless`` has no paths, for the reason given. ``examples`` holds, by name and layer, the
    experts and weights of every token of pictures that were kept.
    """

    def __init__(self, notes: Iterable[Note], capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.notes, self.tallies = dict[str, Note](), dict[str, Tally]()
        self.paths: dict[int, dict[str, PathCounter]] = {}
        self.sets: dict[int, dict[str, PathCounter]] = {}
        self.pathless: dict[int, str] = {}
        self.examples: dict[str, dict[str, dict[str, Any]]] = {}
        for note in notes:
            self._meet(note)

    @torch.no_grad()
    def add(
        self, routings: Sequence[Routing], positions: Positions | None = None, *, again: bool = False
    ) -> None:
        """Count one forward pass.

        ``positions`` say what the decoder's tokens are: padding does not count, and all that is not visual
        is text. A step that continues earlier ones is ``again`` a pass over the same rows, whose decisions
        as a whole were counted then.

        Raises:
            VlmixError: if ``positions`` are those of other tokens.

        """
        seen: defaultdict[int, dict[str, list[tuple[Choices | None, Tensor]]]] = defaultdict(dict)
        for routing in routings:
            note = self._note(routing)
            group_T = _groups(note, routing, positions or Positions(), again)
            found = self.tallies[note.name].add(routing, group_T)
            seen[note.mixture].setdefault(note.name, []).append((found, group_T))
        for mixture, layers in seen.items():
            if mixture not in self.pathless:
                self._follow(mixture, layers)

    def keep(self, name: str, routings: Sequence[Routing], positions: Positions) -> None:
        """Keep what each visual token of one row chose, as example ``name``; nothing is counted.

        Where all tokens mix, the expert with the largest share stands for the choice.
        """
        kept: dict[str, dict[str, Any]] = {}
        for routing in routings:
            note = self._note(routing)
            group_T = _groups(note, routing, positions, again=False)
            if routing.mixing is None:
                found = choices_of(routing)
                ranked_TK = found.ranked
                weights_TK = found.weights.gather(1, ranked_TK.clamp_min(0)) * (ranked_TK >= 0)
            else:
                largest = routing.probabilities.detach().double().cpu().max(-1, keepdim=True)
                weights_TK, ranked_TK = largest.values, largest.indices
            shown_T = group_T == _VISUAL
            weights = [[round(weight, _DIGITS) for weight in row] for row in weights_TK[shown_T].tolist()]
            kept[note.name] = {"experts": ranked_TK[shown_T].tolist(), "weights": weights}
        self.examples[name] = kept

    def merge(self, other: RoutingRecorder) -> None:
        """Add what another recorder of the same layers counted, such as that of another process.

        Raises:
            VlmixError: if the layers differ.

        """
        for name, note in other.notes.items():
            if self.notes.get(name, note) != note:
                raise VlmixError(f"{name}: two recorders of different models, so their counts do not add up")
            self._meet(note)
        for name, tally in other.tallies.items():
            self.tallies[name].merge(tally)
        for mine, theirs in ((self.paths, other.paths), (self.sets, other.sets)):
            for mixture, counters in theirs.items():
                for group, counter in counters.items():
                    mine[mixture][group].merge(counter)
        self.examples |= other.examples
        for mixture, reason in other.pathless.items():
            self._give_up(mixture, reason)

    def to_json(self) -> dict[str, Any]:
        """Everything, as ``from_json`` reads it; figures without rounding."""
        return {
            "schema": SCHEMA,
            "groups": list(GROUPS),
            "capacity": self.capacity,
            "layers": [{**asdict(note), **self.tallies[name].to_json()} for name, note in self.notes.items()],
            "paths": _written(self.paths),
            "sets": _written(self.sets),
            "pathless": {str(mixture): reason for mixture, reason in self.pathless.items()},
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The recorder that ``to_json`` wrote.

        Raises:
            VlmixError: if it is of another kind.

        """
        if raw.get("schema") != SCHEMA:
            raise VlmixError(f"routing of schema {raw.get('schema')!r}, not {SCHEMA!r}")
        names = Note.__dataclass_fields__
        made = cls([Note(**{key: layer[key] for key in names}) for layer in raw["layers"]], raw["capacity"])
        made.tallies = {layer["name"]: Tally.from_json(layer) for layer in raw["layers"]}
        made.paths, made.sets = (_read(raw[name], raw["capacity"]) for name in ("paths", "sets"))
        made.pathless = {int(mixture): reason for mixture, reason in raw["pathless"].items()}
        made.examples = dict(raw["examples"])
        return made

    def mixtures(self) -> dict[int, list[Note]]:
        """The layers of every mixture, in order."""
        found: dict[int, list[Note]] = {}
        for note in self.notes.values():
            found.setdefault(note.mixture, []).append(note)
        return found

    def _counters(self) -> dict[str, PathCounter]:
        return {group: PathCounter(self.capacity) for group in GROUPS}

    def _note(self, routing: Routing) -> Note:
        name, k = routing.layer, routing.indices.shape[1]
        if name not in self.notes:  # a part that routes by itself, such as a fusion that weighs encoders
            self._meet(Note(name, len(self.paths), name, routing.experts, k, routing.shape[1] == 1))
        return self.notes[name]

    def _meet(self, note: Note) -> None:
        if note.name not in self.notes:
            self.notes[note.name], self.tallies[note.name] = note, Tally(note.experts)
        if note.mixture not in self.paths:
            self.paths[note.mixture], self.sets[note.mixture] = self._counters(), self._counters()

    def _follow(self, mixture: int, layers: Mapping[str, list[tuple[Choices | None, Tensor]]]) -> None:
        """Count the paths of one forward pass; a layer that runs several times is followed each time."""
        notes = self.mixtures()[mixture]
        runs = [layers.get(note.name, []) for note in notes]
        reason = _obstacle(runs)
        if reason:
            self._give_up(mixture, reason)
            return
        for run in zip(*runs, strict=True):
            group_T = run[0][1]
            found = [choices for choices, _ in run if choices is not None]
            for number, group in enumerate(GROUPS):
                here_T = group_T == number
                if not bool(here_T.any()):
                    continue
                firsts_TL = torch.stack([choices.first[here_T] for choices in found], dim=1)
                self.paths[mixture][group].add(_joined(Counter(map(tuple, firsts_TL.tolist()))))
                if any(choices.ranked.shape[1] > 1 for choices in found):
                    sets = [_members(choices.ranked[here_T]) for choices in found]
                    self.sets[mixture][group].add(_joined(Counter(zip(*sets, strict=True))))

    def _give_up(self, mixture: int, reason: str) -> None:
        self.pathless[mixture] = reason
        self.paths[mixture], self.sets[mixture] = self._counters(), self._counters()


def _groups(note: Note, routing: Routing, positions: Positions, again: bool) -> Tensor:
    """The group of every decision, -1 of those that do not count: (T,)."""
    decisions = routing.shape[0] * routing.shape[1]
    if note.whole:
        return torch.full((decisions,), -1 if again else _WHOLE)
    if note.place != DECODER:
        return torch.full((decisions,), _VISUAL)
    group_T = torch.full((decisions,), _TEXT)
    for mask, value, where in ((positions.visual, _VISUAL, True), (positions.real, -1, False)):
        if mask is None:
            continue
        if mask.numel() != decisions:
            raise VlmixError(
                f"{note.name} decided for {decisions} tokens, and positions of {mask.numel()} were given"
            )
        group_T[mask.flatten().cpu().bool() == where] = value
    return group_T


def _obstacle(runs: Sequence[Sequence[tuple[Choices | None, Tensor]]]) -> str:
    """Why tokens cannot be followed through these layers, if so."""
    if len({len(run) for run in runs}) > 1:
        return "its layers do not run equally often, so no token can be followed through them"
    if any(choices is None for run in runs for choices, _ in run):
        return "every expert sees a mixture of all tokens, so nothing is chosen and there are no paths"
    for step in zip(*runs, strict=True):
        if any(not torch.equal(group_T, step[0][1]) for _, group_T in step):
            return "its layers work on different numbers of tokens, so no token can be followed through them"
    return ""


def _members(ranked_TK: Tensor) -> list[str]:
    """Each decision's experts in the order of their numbers, as ``0+2``."""
    rows = ranked_TK.sort(-1).values.tolist()
    return ["+".join(str(expert) for expert in row if expert >= 0) or "-" for row in rows]


def _joined(found: Mapping[tuple[Any, ...], int]) -> dict[str, int]:
    return {
        ">".join("-" if step == -1 else str(step) for step in path): count for path, count in found.items()
    }


def _written(counters: Mapping[int, Mapping[str, PathCounter]]) -> dict[str, Any]:
    return {
        str(mixture): {group: counter.to_json() for group, counter in found.items() if counter.total}
        for mixture, found in counters.items()
    }


def _read(raw: Mapping[str, Any], capacity: int) -> dict[int, dict[str, PathCounter]]:
    made: dict[int, dict[str, PathCounter]] = {}
    for mixture, found in raw.items():
        read = {group: PathCounter.from_json(counter) for group, counter in found.items()}
        made[int(mixture)] = {group: read.get(group, PathCounter(capacity)) for group in GROUPS}
    return made
