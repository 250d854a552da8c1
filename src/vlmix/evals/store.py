"""Answers on disk as soon as they are given, so that a run that was interrupted goes on where it stopped.

A line is the hash of everything an answer follows from, and the answer. A changed model, prompt, picture,
setting or package is another hash, so nothing is reused that might be another answer today. Each process
adds to a file of its own and reads those of all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmix.core.errors import ImageError, InputError
from vlmix.core.files import MANIFEST, sha256, storage_errors
from vlmix.core.sample import Answer, Decoding, ImageRef, Json, Responder, Sample
from vlmix.evals.answering import batches_of, in_order
from vlmix.evals.plain_text import Likelihood, telling

Kept = Callable[[int, int], None]
"""Called with how many answers were there before, and of how many questions."""
Ready = Callable[[int], None]
"""Called with how many more answers are there."""


class AnswerStore:
    """What is in ``folder``'s files; ``add`` writes to the one of process ``number``.

    A last line that was cut short when a process died is taken away; any other line that is none is asked
    again.
    """

    def __init__(self, folder: Path, number: int = 0) -> None:
        self._path = folder / f"answers-{number}.jsonl"
        self._found: dict[str, Any] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            self._read(path)
        content = self._path.read_bytes() if self._path.exists() else b""
        self._whole = content.rfind(b"\n") + 1

    def get(self, key: str) -> Any:
        """What was kept under ``key``, or None."""
        return self._found.get(key)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep these, on disk when this returns.

        Raises:
            DiskFullError: if there is no room; what was kept before is intact.

        """
        if not found:
            return
        lines = [json.dumps({"key": key, "kept": kept}) + "\n" for key, kept in found.items()]
        content = "".join(lines).encode()
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("r+b" if self._path.exists() else "xb") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self._whole += len(content)
        self._found |= found

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        for line in content[: content.rfind(b"\n") + 1].splitlines():
            try:
                row = json.loads(line)
                self._found[row["key"]] = row["kept"]
            except (ValueError, LookupError, TypeError):
                continue


class StoredResponder:
    """A responder whose answers are kept in ``store`` under hashes that begin with ``basis``.

    ``basis`` is all that an answer follows from besides the question and the decoding: the model, the
    benchmark's settings, the versions. The batch size has no part in it. Answers with an error are not kept.
    """

    def __init__(
        self,
        responder: Responder,
        store: AnswerStore,
        basis: Mapping[str, Json],
        kept: Kept,
        ready: Ready,
    ) -> None:
        self._responder, self._store, self._basis = responder, store, basis
        self._tell_kept, self._tell_ready = kept, ready

    def respond(self, samples: Iterable[Sample], decoding: Decoding) -> Iterator[Answer]:
        """Yield one answer for each sample, in order, asking only for those that are not there."""
        return in_order(self.batches(list(samples), decoding))

    def batches(self, samples: Sequence[Sample], decoding: Decoding) -> Iterator[Mapping[int, Answer]]:
        """Those that are there, then the others as they are given; each is on disk before it is told."""
        keys = [self._key(sample, decoding) for sample in samples]
        there = {place: self._store.get(key) for place, key in enumerate(keys)}
        known = {
            place: Answer(samples[place].id, **kept) for place, kept in there.items() if kept is not None
        }
        if known:
            self._tell_kept(len(known), len(samples))
            self._tell_ready(len(known))
            yield known
        left = [place for place in range(len(samples)) if place not in known]
        for batch in batches_of(self._responder, [samples[place] for place in left], decoding):
            given = {left[number]: answer for number, answer in batch.items()}
            self._store.add(
                {keys[place]: _kept(one) for place, one in given.items() if keys[place] and not one.error}
            )
            self._tell_ready(len(given))
            yield given

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], window: int | None = None
    ) -> Iterator[Likelihood]:
        """All of them from the store, or all asked for: what is judged together depends on all."""
        key = _digest([dict(self._basis), "likelihoods", list(pairs), window])
        rows = self._store.get(key)
        if rows is None:
            told = list(telling(self._responder).likelihoods(pairs, window))
            rows = [[one.nats, one.tokens, one.greedy] for one in told]
            self._store.add({key: rows})
        return iter([Likelihood(nats, tokens, greedy=greedy) for nats, tokens, greedy in rows])

    def _key(self, sample: Sample, decoding: Decoding) -> str:
        """The hash of a question, or nothing where a picture of it is missing: it cannot be answered."""
        how = asdict(decoding)
        del how["batch_size"]
        try:
            said = [[turn.role, *map(_part, turn.parts)] for turn in sample.turns]
        except (ImageError, OSError):
            return ""
        return _digest([dict(self._basis), how, sample.id, said, list(sample.options)])


def model_digest(folder: Path) -> str:
    """The SHA-256 of a model folder: of its manifest, which `load` checks, or of every file in it.

    Raises:
        InputError: if it holds no file.

    """
    if (folder / MANIFEST).is_file():
        return sha256(folder / MANIFEST)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise InputError(f"{folder} holds no file")
    return _digest([[path.relative_to(folder).as_posix(), sha256(path)] for path in files])


def _part(part: str | ImageRef) -> list[str]:
    return ["text", part] if isinstance(part, str) else ["picture", part.digest()]


def _kept(answer: Answer) -> dict[str, Json]:
    return {"text": answer.text, "tokens": answer.tokens, "seconds": answer.seconds, "nats": answer.nats}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
