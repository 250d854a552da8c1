"""The account of a conversion: how each of our tensors comes about, and why others of theirs stay behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from vlmix.convert._family import Reading
from vlmix.convert._names import Names, Piece, Rename
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration

# Eight bits mean nothing without scales, which no family stores.
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK = 1 << 24  # numbers looked at at once, so that looking needs no memory to speak of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Move:
    """One of our tensors on its way: from which folder, and which of their tensors make it up."""

    folder: PublishedFolder
    ours: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.folder.tensors[piece.theirs].size // piece.cut[1] for piece in self.pieces)

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            CheckpointError: if it cannot be read, or holds a number that is not finite.

        """
        first, *rest = self.pieces
        tensor = finite(self.folder, first.theirs)
        if first.cut != (0, 1):
            return tensor[first.within(len(tensor))].clone()
        if not first.box:
            return tensor
        whole = tensor.new_empty(self.shape)
        whole[first.box] = tensor
        for piece in rest:
            whole[piece.box] = finite(self.folder, piece.theirs)
        return whole


@dataclass(frozen=True, slots=True)
class Twin:
    """A tied tensor of theirs that is stored again: it must equal theirs called ``same``, ours ``ours``."""

    folder: PublishedFolder
    theirs: str
    same: str
    ours: str


@dataclass(frozen=True, slots=True)
class Account:
    """Every tensor of ours, and every one of theirs that has no place here, with the reason.

    ``stand_ins`` are rules for tied tensors that are stored under the other's name only.
    """

    moves: Sequence[Move]
    kept: Sequence[tuple[PublishedFolder, str, str]]
    twins: Sequence[Twin]
    stand_ins: Names


def account(folder: PublishedFolder, reading: Reading, config: VlmixConfig) -> Account:
    """Give every tensor on either side its counterpart or a reason to have none.

    Raises:
        CheckpointError: listing all that have neither.

    """
    wanted, tied = wanted_shapes(config)
    moves: dict[str, Move] = {}
    kept: list[tuple[PublishedFolder, str, str]] = []
    twins: list[Twin] = []
    faults: list[str] = []
    stand_ins = _stand_ins(folder, reading.names, tied)
    for part, names in ((folder, stand_ins + reading.names), *reading.towers):
        found = _moves(part, names, wanted)
        moves |= {move.ours: move for move in found}
        for theirs in part.tensors.keys() - {piece.theirs for move in found for piece in move.pieces}:
            if (reason := names.reason(theirs)) is not None:
                kept.append((part, theirs, reason))
            elif (ours := tied.get(names.ours(theirs) or "")) in moves:
                twins.append(Twin(part, theirs, moves[ours].pieces[0].theirs, ours))
            else:
                faults.append(f"left over: {theirs}")
    faults += [f"missing: {name}" for name in wanted.keys() - moves.keys()]
    faults += [fault for move in moves.values() for fault in _faults(move)]
    if faults:
        shown = "\n  ".join(sorted(faults)[:20])
        raise CheckpointError(f"{folder.folder}: {len(faults)} tensors do not fit:\n  {shown}")
    for twin in twins:
        _check_equal(twin)
    return Account([moves[name] for name in wanted], sorted(kept, key=itemgetter(1)), twins, stand_ins)


def wanted_shapes(config: VlmixConfig) -> tuple[Shapes, Mapping[str, str]]:
    """Names and shapes of the model's saved tensors, and those tied to one of them; nothing is allocated."""
    with torch.device("meta"):
        model = VlmixForConditionalGeneration(config)
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)], shapes[name] = name, tuple(tensor.shape)
    return shapes, tied


def _stand_ins(folder: PublishedFolder, names: Names, tied: Mapping[str, str]) -> Names:
    """Rules for tied tensors of which only the second is stored, such as a head without embeddings."""
    pairs = [(names.theirs(second), names.theirs(first), first) for second, first in tied.items()]
    stored = folder.tensors.keys()
    return Names(
        [
            Rename(theirs, first)
            for theirs, usual, first in pairs
            if theirs is not None and theirs in stored and usual not in stored
        ]
    )


def _moves(part: PublishedFolder, names: Names, wanted: Shapes) -> list[Move]:
    """What this folder gives: of a tensor in pieces, some pieces may be missing."""
    found = [
        Move(part, ours, shape, pieces)
        for ours, shape in wanted.items()
        if (pieces := names.pieces(ours, shape)) is not None
    ]
    return [move for move in found if any(_has(move, piece) for piece in move.pieces)]


def _faults(move: Move) -> list[str]:
    """What is wrong with the shapes and types of the tensors that make up one of ours."""
    faults: list[str] = []
    whole = torch.empty(move.shape, device="meta")
    types = {move.folder.tensors[piece.theirs].dtype for piece in move.pieces if _has(move, piece)}
    for piece in move.pieces:
        if not _has(move, piece):
            faults.append(f"missing: {piece.theirs}")
            continue
        stored, shape = move.folder.tensors[piece.theirs], tuple(whole[piece.box].shape)
        if piece.cut != (0, 1):
            shape = (shape[0] * piece.cut[1], *shape[1:])
        if stored.shape != shape:
            faults.append(f"{piece.theirs} is {stored.shape}, here {shape}")
        elif stored.dtype not in _FLOATS:
            faults.append(f"{piece.theirs} is {stored.dtype}, not floating point of 16 bits or more")
        elif len(types) > 1:
            faults.append(f"{piece.theirs} is {stored.dtype}, its neighbours in one stack are not")
    return faults


def _has(move: Move, piece: Piece) -> bool:
    return piece.theirs in move.folder.tensors


def finite(folder: PublishedFolder, name: str) -> Tensor:
    """One tensor of a published folder.

    Raises:
        CheckpointError: if it cannot be read, or holds a number that is not finite.

    """
    tensor = folder.tensor(name)
    if not all(bool(torch.isfinite(chunk).all()) for chunk in tensor.reshape(-1).split(_CHUNK)):
        raise CheckpointError(f"{folder.tensors[name].source}: {name} holds a number that is not finite")
    return tensor


def _check_equal(twin: Twin) -> None:
    """Compare a tied tensor with the one it must equal, some rows at a time."""
    stored, same = twin.folder.tensors[twin.theirs], twin.folder.tensors[twin.same]
    equal = stored.shape == same.shape
    rows = max(_CHUNK // max(stored.shape[-1], 1), 1) if equal and stored.shape else 1
    for start in range(0, stored.shape[0] if equal else 0, rows):
        box = (slice(start, start + rows),)
        equal = equal and torch.equal(
            twin.folder.tensor(twin.theirs, box), twin.folder.tensor(twin.same, box)
        )
    if not equal:
        raise CheckpointError(
            f"{twin.folder.folder}: the config ties {twin.theirs} to {twin.same}, but they are stored with "
            "other numbers. To keep both, untie them: --set text_config.tie_word_embeddings=false"
        )
