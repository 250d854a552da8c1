"""What an accuracy must beat to mean anything: the commonest answer, and the same model looking elsewhere."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmix.core.errors import SampleError
from vlmix.core.sample import ImageRef, Sample, Turn


def question_of(sample: Sample) -> Sample:
    """The sample as a responder may see it: up to its last user turn, without target and meta data.

    Assistant turns at the end are the answer and are removed; earlier ones are context and stay.

    Raises:
        SampleError: if no user turn ends what is left.

    """
    turns = sample.turns
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise SampleError(
            f"sample {sample.id!r} has no user turn to answer: a question ends with a user turn, "
            "optionally followed by the assistant turn that is its answer",
            sample_id=sample.id,
        )
    return replace(sample, turns=turns, target=None, meta={})


def targets_of(sample: Sample) -> tuple[str, ...]:
    """Every answer that counts as right, the preferred one first; empty if the sample has none."""
    if sample.target is None:
        return ()
    return (sample.target,) if isinstance(sample.target, str) else sample.target


def majority_answer(samples: Sequence[Sample]) -> str:
    """The most frequent target; of equals, the first in alphabetical order. Empty if there is no target."""
    counts = Counter(target for sample in samples for target in dict.fromkeys(targets_of(sample)))
    return min(counts, key=lambda target: (-counts[target], target), default="")


def majority_by_task(samples: Sequence[Sample]) -> Mapping[str, str]:
    """The most frequent target of each task."""
    tasks: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        tasks[sample.task].append(sample)
    return {task: majority_answer(tasks[task]) for task in sorted(tasks)}


def blinded(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The same questions, each with the pictures of another question of its task, in their order.

    Pictures move between questions of one task with equally many pictures and always come from another
    group, so that no question keeps its own. Questions for which there is no such donor are left out; the
    length of the result says how many remain. Questions without pictures are blind already and stay.
    """
    cells: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        cells[sample.task, len(sample.images)].append(index)
    donors: dict[int, int] = {}
    for key in sorted(cells):
        donors |= _donors(samples, cells[key], random.Random(f"{seed} {key}"))
    return [
        _with_images(sample, samples[donors[index]].images) if sample.images else sample
        for index, sample in enumerate(samples)
        if index in donors or not sample.images
    ]


def _donors(samples: Sequence[Sample], cell: Sequence[int], order: random.Random) -> Mapping[int, int]:
    """Who gives pictures to whom: groups in random order, laid out in a ring that turns by the largest group.

    A group of b of n samples never meets itself while b <= turn <= n - b, so half the cell is the limit.
    """
    groups: defaultdict[tuple[bool, str], list[int]] = defaultdict(list)
    for index in cell:
        sample = samples[index]
        groups[bool(sample.group), sample.group or sample.id].append(index)
    turn, names = max(map(len, groups.values())), sorted(groups)
    if 2 * turn > len(cell):
        return {}
    order.shuffle(names)
    ring = [index for name in names for index in groups[name]]
    return dict(zip(ring, ring[turn:] + ring[:turn], strict=True))


def _with_images(sample: Sample, images: Sequence[ImageRef]) -> Sample:
    left = iter(images)
    turns = tuple(
        Turn(turn.role, tuple(next(left) if isinstance(part, ImageRef) else part for part in turn.parts))
        for turn in sample.turns
    )
    return replace(sample, turns=turns)
