"""How long samples are in a model's own tokens, before anything is trained: for checking data."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmix.core.errors import ContextLengthError, InputError
from vlmix.core.sample import Sample
from vlmix.data.check import Lengths
from vlmix.models.processing import VlmixProcessor


class TokenLengths:
    """Counts as training will see it: template, tokenizer, views and ``max_length`` of a processor."""

    unit: str = "tokens"

    def __init__(self, processor: VlmixProcessor) -> None:
        self.processor = processor
        self.max_length: int | None = processor.max_length

    def __call__(self, sample: Sample) -> Lengths:
        """Tokens of text, template included, and of pictures.

        Raises:
            SampleError: if the template cannot write it.
            ImageError: if a picture's size is needed and cannot be read.

        """
        encoded = self.processor.encode(sample, supervise=True, max_length=sys.maxsize)
        visual = sum(token == self.processor.image_token_id for token in encoded.input_ids)
        over, refused = self.max_length is not None and len(encoded.input_ids) > self.max_length, ""
        if over:
            try:
                self.processor.encode(sample, supervise=True)
            except ContextLengthError as error:
                refused = str(error)
        return Lengths(len(encoded.input_ids) - visual, visual, over, refused)


class TextLengths:
    """Counts with a tokenizer alone: the text without a template, and ``visual`` tokens for each picture."""

    unit: str = "tokens"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, visual: int = 0, max_length: int | None = None
    ) -> None:
        self.tokenizer, self.visual, self.max_length = tokenizer, visual, max_length

    def __call__(self, sample: Sample) -> Lengths:
        """Tokens of every turn's text, and of pictures."""
        texts = [turn.text for turn in sample.turns]
        coded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        text, visual = sum(map(len, coded)), self.visual * len(sample.images)
        over = self.max_length is not None and text + visual > self.max_length
        reason = f"{text + visual} tokens, but the limit is {self.max_length}" if over else ""
        return Lengths(text, visual, over, reason)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or hub id.

    Raises:
        InputError: if there is none.

    """
    folder = Path(source) / "model"
    try:
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else source)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"--tokenizer {source}: no tokenizer there ({first})") from None
