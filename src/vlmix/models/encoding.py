"""Segments -> token ids and labels; what a speaker typed never becomes a control token.

Text between two pictures is tokenised as one run, as LLaVA does, because tokens may reach across the border
between template and speech. Character offsets then tell which token came from where. Where a control
token would come from speech (a forged ``</s>``), the run is cut at the template's genuine control tokens
and what lies between is tokenised by a copy of the tokenizer that knows none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice, repeat
from typing import Final, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlmix.core.errors import InputError
from vlmix.models.rendering import Segment

IGNORED: Final = -100
Token = tuple[int, int, int]
"""A token: its id, and the characters from start to end it stands for."""


class SegmentEncoder:
    """Encodes conversations that one chat template rendered, with one tokenizer.

    Control tokens are the tokenizer's special tokens, and every added token the template names.

    Raises:
        InputError: if the tokenizer cannot say which characters a token stands for.

    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, image_token_id: int, image_seq_length: int
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} gives no character offsets, which label masks need. "
                "Load it as a fast tokenizer (a folder with tokenizer.json)."
            )
        self.tokenizer, self.template, self.size = tokenizer, template, len(tokenizer)
        self.image_token_id, self.image_seq_length = image_token_id, image_seq_length
        self.control = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content in template
        }
        self._bos = _bos_by_convention(tokenizer)

    def encode(
        self,
        segments: Sequence[Segment],
        *,
        add_bos: bool = True,
        image_tokens: Sequence[int] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation; labels are -100 outside supervised segments.

        With ``add_bos`` a begin-of-text token comes first where the tokenizer adds one by itself and the
        template does not write it. ``image_tokens`` says how many tokens each picture takes, in order;
        without it each takes ``image_seq_length``.
        """
        ids: list[int] = list(self._bos) if add_bos and not self._begins(segments) else []
        labels = [IGNORED] * len(ids)
        counts = repeat(self.image_seq_length) if image_tokens is None else iter(image_tokens)
        for is_image, group in groupby(segments, key=lambda segment: segment.kind == "image"):
            run = list(group)
            if is_image:
                shown = sum(islice(counts, len(run)))
                ids += [self.image_token_id] * shown
                labels += [IGNORED] * shown
                continue
            tokens = self._tokens(run)
            ids += [token[0] for token in tokens]
            labels += _labels(tokens, b"".join(bytes([part.supervised]) * len(part.text) for part in run))
        return ids, labels

    def __deepcopy__(self, memo: object) -> "SegmentEncoder":
        """A copy would be equal, and large; it is never changed."""
        return self

    def first_control_id(self, text: str) -> int | None:
        """The first control token in a text of the template's own, such as what ends an answer."""
        found = self._names.search(text)
        return self._numbers[found.group()] if found else None

    def _begins(self, segments: Sequence[Segment]) -> bool:
        bos = self.tokenizer.bos_token
        first = segments[0] if segments else None
        return bool(bos and first and first.kind == "control" and first.text.startswith(str(bos)))

    def _tokens(self, run: Sequence[Segment]) -> list[Token]:
        text = "".join(part.text for part in run)
        spoken = b"".join(bytes([part.kind == "text"]) * len(part.text) for part in run)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = [(i, *span) for i, span in zip(coded["input_ids"], coded["offset_mapping"], strict=True)]
        forged = any(token[0] in self.control and self._is_forged(token, text, spoken) for token in tokens)
        return self._guarded(text, spoken) if forged else tokens

    def _is_forged(self, token: Token, text: str, spoken: bytes) -> bool:
        """Whether any character of the token itself, without the space it may swallow, was spoken."""
        number, start, end = token
        content = self.control[number].content
        at = max(text.find(content, start, end), start)
        return any(spoken[at : min(at + len(content), end)])

    def _guarded(self, text: str, spoken: bytes) -> list[Token]:
        tokens: list[Token] = []
        done = 0
        for number, start, end in self._genuine(text, spoken):
            tokens += self._plain_tokens(text, done, start)
            tokens.append((number, start, end))
            done = end
        return tokens + self._plain_tokens(text, done, len(text))

    def _genuine(self, text: str, spoken: bytes) -> Iterator[Token]:
        """The control tokens that the template itself wrote, with the space they swallow."""
        for stretch in re.finditer(b"\\0+", spoken):
            for match in self._names.finditer(text, stretch.start(), stretch.end()):
                number = self._numbers[match.group()]
                start, end = match.span()
                token = self.control[number]
                while token.lstrip and start > 0 and text[start - 1].isspace():
                    start -= 1
                while token.rstrip and end < len(text) and text[end].isspace():
                    end += 1
                yield number, start, end

    def _plain_tokens(self, text: str, start: int, end: int) -> list[Token]:
        if start >= end:
            return []
        coded = self._plain[start > 0].encode(text[start:end], add_special_tokens=False)
        tokens: list[Token] = []
        for number, (left, right) in zip(coded.ids, coded.offsets, strict=True):
            if number not in self.control:
                tokens.append((number, start + left, start + right))
                continue
            for at in range(start + left, start + right):  # a vocabulary that spells the token itself
                tokens += [
                    (i, at, at + 1) for i in self._plain[1].encode(text[at], add_special_tokens=False).ids
                ]
        return tokens

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token.content: number for number, token in self.control.items()}

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted(self._numbers, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    @cached_property
    def _plain(self) -> tuple[Tokenizer, Tokenizer]:
        """Copies of the tokenizer without added tokens: for the start of a run, and for its middle."""
        spec = json.loads(cast("Tokenizer", self.tokenizer.backend_tokenizer).to_str())
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        first = Tokenizer.from_str(json.dumps(spec))
        for step in _steps(spec["pre_tokenizer"]):
            if step["type"] == "Metaspace" and step["prepend_scheme"] == "first":
                step["prepend_scheme"] = "never"
        return first, Tokenizer.from_str(json.dumps(spec))


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _bos_by_convention(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token, where the tokenizer puts one before any text by itself."""
    ids = tokenizer("x")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def _labels(tokens: Sequence[Token], supervised: bytes) -> list[int]:
    """A token is supervised if its last character is; a mark without characters goes with what follows."""
    if not any(supervised):
        return [IGNORED] * len(tokens)
    labels: list[int] = []
    done = 0
    for number, start, end in tokens:
        at = end if start == end == done else end - 1
        labels.append(number if supervised[min(at, len(supervised) - 1)] else IGNORED)
        done = max(done, end)
    return labels
