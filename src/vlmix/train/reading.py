"""The rows of an optimizer step as tensors: read, planned into micro-batches, and opened for one rank.

Every rank reads the words of all rows of a step, so that all plan the same micro-batches from true lengths;
it opens the pictures of its own alone. A picture that turns out bad leaves the plan of the others as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmix.core.batching import BatchingSettings
from vlmix.core.errors import ContextLengthError, ImageCountError, ImageError, SampleError, VlmixError
from vlmix.core.interfaces import Source
from vlmix.core.sample import Sample
from vlmix.models.batching import Encoded, Opened
from vlmix.models.processing import VlmixProcessor
from vlmix.train.batching import Shape, deal_window, plan_micro_batches
from vlmix.train.feature_reader import FeatureReader
from vlmix.train.order import DataOrder, RowId

BAD_ROW = (SampleError, ImageError, ContextLengthError, ImageCountError)
IGNORED = -100
_WINDOW = 2  # a family of permutations beside those of ``order``
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A source with the name that the ledger and messages give it."""

    name: str
    source: Source


@dataclass(frozen=True, slots=True)
class SampleEncoder:
    """Samples to tensors, answers supervised; ``packed`` gives one row without padding.

    With ``features``, pictures that frozen encoders saw before are not opened.
    """

    processor: VlmixProcessor
    packed: bool = False
    features: FeatureReader | None = None

    def encode(self, sample: Sample) -> Encoded:
        """Words and placeholders of one sample; no picture is opened."""
        return self.processor.encode(sample, supervise=True)

    def open(self, encoded: Encoded) -> Opened:
        """Its pictures."""
        opened = self.processor.open_images(encoded)
        return opened if self.features is None or not encoded.images else self.features.keyed(encoded, opened)

    def kept(self, encoded: Sequence[Encoded]) -> list[Opened] | None:
        """The pictures of a micro-batch as encoders saw them, if they saw all."""
        return None if self.features is None else self.features.kept(encoded)

    def collate(self, encoded: Sequence[Encoded], opened: Sequence[Opened]) -> dict[str, Tensor]:
        """Several samples as one micro-batch."""
        if self.packed:
            return dict(self.processor.collate(encoded, opened=opened, packed=True))
        return dict(self.processor.collate(encoded, padding_side="right", opened=opened))


@dataclass(frozen=True, slots=True)
class Read:
    """One row as read: its words, or why it cannot be used."""

    row: RowId
    sample_id: str
    encoded: Encoded | None = None
    reason: str = ""
    line: int = 0

    @property
    def shape(self) -> Shape:
        """Its length; 0 of a row that cannot be used."""
        return (
            Shape(0, 0)
            if self.encoded is None
            else Shape(len(self.encoded.input_ids), len(self.encoded.images))
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """What one rank trains on in a step, one micro-batch a round; ``None`` where it has none in that round.

    ``pictured`` are the rounds in which a rank has pictures, ``rows`` those this rank answers for.
    ``tokens`` are true ones, ``positions`` padding included. ``problem`` is what ended a worker's reading.
    """

    micro_batches: tuple[Mapping[str, Tensor] | None, ...] = ()
    pictured: tuple[bool, ...] = ()
    rows: tuple[Read, ...] = ()
    tokens: int = 0
    positions: int = 0
    supervised_tokens: int = 0
    problem: str = ""


@dataclass(frozen=True)
class StepReader(Dataset[Prepared]):
    """Gives the data of any step of a stage, as rank ``rank`` of ``world`` trains on it."""

    order: DataOrder
    sources: Sequence[NamedSource]
    encoder: SampleEncoder
    batching: BatchingSettings
    micro_batch_size: int
    rank: int = 0
    world: int = 1
    _dealt: dict[int, list[list[Read]]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.order.steps

    def __getitem__(self, step: int) -> Prepared:
        """Read step ``step``, counted from 0; the same on every call."""
        rows = self._step(step)
        good = [row for row in rows if row.encoded is not None]
        plan = plan_micro_batches([row.shape for row in good], self.batching, self.micro_batch_size)
        rounds = [plan[i : i + self.world] for i in range(0, len(plan), self.world)]
        mine = [
            [good[at] for at in batches[self.rank]] if self.rank < len(batches) else [] for batches in rounds
        ]
        opened = [self._open(rows) for rows in mine]
        made = tuple(self._collate(rows) for rows in opened)
        # Rows without words are nobody's; the first rank answers for them.
        bad = [row for row in rows if row.encoded is None] if self.rank == 0 else []
        kept = [row.encoded for rows in opened for row, _ in rows if row.encoded is not None]
        return Prepared(
            micro_batches=made,
            pictured=tuple(any(good[at].shape.pictures for b in batches for at in b) for batches in rounds),
            rows=(*bad, *(row for rows in opened for row, _ in rows)),
            tokens=sum(len(encoded.input_ids) for encoded in kept),
            positions=sum(batch["input_ids"].numel() for batch in made if batch is not None),
            supervised_tokens=sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in made if b is not None),
        )

    def _step(self, step: int) -> list[Read]:
        window = self.batching.window
        if window == 1:
            return [self._read(row) for row in self.order.rows_for_step(step)]
        number, place = divmod(step, window)
        if number not in self._dealt:
            self._dealt.clear()
            self._dealt[number] = self._deal(number)
        return self._dealt[number][place]

    def _deal(self, number: int) -> list[list[Read]]:
        window = self.batching.window
        steps = range(number * window, min((number + 1) * window, self.order.steps))
        reads = [self._read(row) for step in steps for row in self.order.rows_for_step(step)]
        seed = (*self.order.seed, _WINDOW, 0, number)
        dealt = deal_window([read.shape for read in reads], self.order.batch_size, seed)
        return [[reads[at] for at in places] for places in dealt]

    def _read(self, row: RowId) -> Read:
        source = self.sources[row.source].source
        sample_id = ""
        try:
            sample = source[row.row]
            sample_id = sample.id
            return Read(row, sample_id, self.encoder.encode(sample))
        except BAD_ROW as error:
            if isinstance(error, SampleError) and error.sample_id:
                sample_id = error.sample_id
            return Read(row, sample_id, reason=str(error), line=source.line(row.row))

    def _open(self, rows: Sequence[Read]) -> list[tuple[Read, Opened | None]]:
        found: list[tuple[Read, Opened | None]] = []
        kept = self.encoder.kept([row.encoded for row in rows if row.encoded is not None])
        if kept is not None:
            return list(zip(rows, kept, strict=True))
        for row in rows:
            try:
                assert row.encoded is not None
                found.append((row, self.encoder.open(row.encoded)))
            except BAD_ROW as error:
                line = self.sources[row.row.source].source.line(row.row.row)
                found.append((replace(row, encoded=None, reason=str(error), line=line), None))
        return found

    def _collate(self, rows: Sequence[tuple[Read, Opened | None]]) -> Mapping[str, Tensor] | None:
        good = [
            (row.encoded, opened) for row, opened in rows if row.encoded is not None and opened is not None
        ]
        if not good:
            return None
        return self.encoder.collate([encoded for encoded, _ in good], [opened for _, opened in good])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor begins in the block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def view(self, block: Tensor) -> Tensor:
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        return block[self.start : self.start + count].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A prepared step on its way between processes: all tensors in one block of shared memory.

    A block of its own for every tensor would need a file descriptor each, of which a process has few.
    """

    block: Tensor
    places: tuple[tuple[_Place, ...] | None, ...]
    rest: Prepared

    @staticmethod
    def of(prepared: Prepared) -> Parcel:
        """Put all tensors behind each other; the words, which nobody reads again, stay here."""
        places: list[tuple[_Place, ...] | None] = []
        pieces: list[Tensor] = []
        start = 0
        for batch in prepared.micro_batches:
            named: list[_Place] = []
            for name, tensor in (batch or {}).items():
                raw = tensor.contiguous().flatten().view(torch.uint8)
                room = -len(raw) % _ALIGNED
                named.append(_Place(name, tensor.dtype, tuple(tensor.shape), start))
                pieces += [raw, raw.new_zeros(room)]
                start += len(raw) + room
            places.append(None if batch is None else tuple(named))
        block = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        rows = tuple(replace(row, encoded=None) for row in prepared.rows)
        return Parcel(block, tuple(places), replace(prepared, micro_batches=(), rows=rows))

    def opened(self) -> Prepared:
        """The step again; its tensors share the block's memory."""
        batches = tuple(
            None if places is None else {place.name: place.view(self.block) for place in places}
            for places in self.places
        )
        return replace(self.rest, micro_batches=batches)


def parcel(reader: StepReader, step: int) -> Parcel:
    """Step ``step`` for another process; what ends the reading travels as words."""
    try:
        return Parcel.of(reader[step])
    except VlmixError as error:
        return Parcel.of(Prepared(problem=str(error)))
