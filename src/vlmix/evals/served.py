"""Answers of a model behind any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Final, Literal

from vlmix.core.errors import InputError
from vlmix.core.sample import Answer, Decoding, ImageRef, Sample
from vlmix.evals.answering import in_order
from vlmix.evals.completions import Completions, NoReplyError, ServerSettings

Pictures = Literal["png", "jpeg"]
_JPEG_QUALITY: Final = 95


class ServerResponder:
    """Asks a server, ``decoding.batch_size`` questions at once; what it fails to answer is an error each.

    Pictures go inside the request, as files of the kind ``pictures``; PNG loses nothing.
    """

    def __init__(self, settings: ServerSettings, pictures: Pictures = "png") -> None:
        self.settings, self.pictures, self._client = settings, pictures, Completions(settings)

    def respond(self, samples: Iterable[Sample], decoding: Decoding) -> Iterator[Answer]:
        """Yield one answer for each sample, in order.

        Raises:
            InputError: if the answers are asked for in a way that chat completions do not know.

        """
        return in_order(self.batches(list(samples), decoding))

    def batches(self, samples: Sequence[Sample], decoding: Decoding) -> Iterator[Mapping[int, Answer]]:
        """The answers as they come in, by the place of their sample.

        Raises:
            InputError: if the answers are asked for in a way that chat completions do not know.

        """
        self._check(decoding)
        waiting = iter(enumerate(samples))
        running: dict[Future[Answer], int] = {}
        with ThreadPoolExecutor(decoding.batch_size) as pool:
            try:
                while True:
                    while len(running) < decoding.batch_size and (one := next(waiting, None)):
                        running[pool.submit(self._answer, one[1], decoding)] = one[0]
                    if not running:
                        return
                    done = wait(running, return_when=FIRST_COMPLETED).done
                    yield {running.pop(each): each.result() for each in done}
            finally:
                for each in running:
                    each.cancel()

    def _check(self, decoding: Decoding) -> None:
        if decoding.plain:
            raise InputError(
                "this benchmark goes on with plain text outside any conversation, which chat completions do "
                "not know: judge a model folder"
            )
        if decoding.choose != "text" or decoding.beams > 1:
            raise InputError("a server tells neither likelihoods nor beams: let it answer with text")

    def _answer(self, sample: Sample, decoding: Decoding) -> Answer:
        started = time.perf_counter()
        try:
            reply = self._client.ask(self._body(sample, decoding))
        except (InputError, NoReplyError) as error:
            return Answer(sample.id, "", error=str(error))
        answer = Answer(sample.id, reply.text.strip(), reply.tokens)
        return replace(answer, seconds=time.perf_counter() - started)

    def _body(self, sample: Sample, decoding: Decoding) -> dict[str, Any]:
        messages = [
            {"role": turn.role, "content": [self._part(part) for part in turn.parts]}
            if turn.images
            else {"role": turn.role, "content": turn.text}
            for turn in sample.turns
        ]
        return {
            "model": self.settings.model,
            "messages": messages,
            "temperature": decoding.temperature,
            "max_tokens": decoding.max_new_tokens,
        }

    def _part(self, part: str | ImageRef) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        file = io.BytesIO()
        more = {"quality": _JPEG_QUALITY} if self.pictures == "jpeg" else {}
        part.open().save(file, self.pictures, **more)
        content = base64.b64encode(file.getvalue()).decode("ascii")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/{self.pictures};base64,{content}"},
        }
