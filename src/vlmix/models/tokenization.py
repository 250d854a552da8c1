"""Tokenizers: one trained on the fly for models from scratch, and what any tokenizer lacks added."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, TypeVar

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmix.core.errors import InputError
from vlmix.models.rendering import IMAGE

PAD, BOS, EOS, TURN_START, TURN_END = "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
T = TypeVar("T", bound=PreTrainedTokenizerBase)
SPECIAL_TOKENS: Final = (PAD, BOS, EOS, IMAGE, TURN_START, TURN_END)
CONTROL_TOKENS: Final = {"bos_token": BOS, "eos_token": TURN_END, "pad_token": PAD}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts in the same order always give the same one.

    Give whole prompts: what a template writes around each turn then costs a token or two. Control tokens in
    them are cut out. Digits stay single tokens, so numbers are read digit by digit. It has the control tokens
    of the templates ``chatml`` and ``vicuna``, ends answers with ``<|im_end|>``, and adds no begin-of-text
    token.

    Raises:
        InputError: if ``vocab_size`` has no room for the 256 bytes and the special tokens.

    """
    least = len(SPECIAL_TOKENS) + len(ByteLevel.alphabet())
    if vocab_size < least:
        raise InputError(f"a vocabulary of {vocab_size} has no room for {least} bytes and special tokens.")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    controls = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer.train_from_iterator((piece for text in texts for piece in controls.split(text)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=TURN_END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return prepare_tokenizer(fast)


def prepare_tokenizer(tokenizer: T, image_token: str = IMAGE) -> T:
    """Add the image token, and a padding token where there is none; pad left, as generation needs.

    The vocabulary may grow by two: resize the model's embeddings to ``len(tokenizer)`` where it did.
    """
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "left"
    return tokenizer
