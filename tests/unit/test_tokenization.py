"""Tokenizers: trained on the fly, and completed."""

import pytest
from transformers import AutoTokenizer

from vlmix.core.errors import InputError
from vlmix.models.tokenization import SPECIAL_TOKENS, prepare_tokenizer, train_tokenizer

TEXTS = ["How many red circles are there? There are 12 red circles.", "Is there a blue square? No."] * 5


def test_the_same_texts_give_the_same_tokenizer_and_any_text_survives() -> None:
    first, second = train_tokenizer(TEXTS, 400), train_tokenizer(TEXTS, 400)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    text = "A 日本語 text,\t12 + 345 \n\x00 é🦊  end "
    assert first.decode(first(text)["input_ids"]) == text
    assert set(first("many circles")) == {"input_ids", "attention_mask"}
    assert len(first("circles")["input_ids"]) < len("circles")


def test_digits_are_read_one_by_one() -> None:
    tokenizer = train_tokenizer(["year 1234 1234 1234"] * 20, 400)
    pieces = tokenizer.tokenize("1234 is 56")
    assert [piece for piece in pieces if any(character.isdigit() for character in piece)] == list("123456")


def test_special_tokens_are_single_and_come_first() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<pad>",
        "<|im_end|>",
        "left",
    )
    assert len(tokenizer) <= 300
    with pytest.raises(InputError, match="a vocabulary of 200 has no room for 262"):
        train_tokenizer(TEXTS, 200)


def test_a_tokenizer_is_completed_once_and_stays_so_on_disk(tmp_path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    size = len(tokenizer)
    assert len(prepare_tokenizer(tokenizer)) == size
    tokenizer.pad_token = None
    prepare_tokenizer(tokenizer, "<picture>")
    assert len(tokenizer) == size + 1
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a <picture>")["input_ids"] == tokenizer("a <picture>")["input_ids"]
