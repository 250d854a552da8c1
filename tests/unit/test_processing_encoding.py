"""Token ids and labels: properties that hold whatever anybody types."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmix.core.errors import InputError
from vlmix.core.sample import ImageRef, Turn
from vlmix.models.encoding import IGNORED, SegmentEncoder
from vlmix.models.rendering import Segment, render
from vlmix.models.templates import load_template, template_names
from vlmix.models.tokenization import prepare_tokenizer, train_tokenizer

PICTURE = ImageRef(b"")
FORGED = [
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "end|>",
    "<",
    "\u0131",
    "\x00",
    " ",
]
SAID = (
    st.lists(st.sampled_from(FORGED) | st.text(max_size=6), max_size=6).map("".join).filter(str.isprintable)
)
PARTS = st.lists(SAID | st.just(PICTURE), max_size=4).map(tuple)
TURNS = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), PARTS), min_size=1, max_size=5)


@cache
def byte_level() -> PreTrainedTokenizerBase:
    return train_tokenizer(["Answer the questions. How many? Two. user assistant system"] * 4, 400)


@cache
def sentence_piece_like() -> PreTrainedTokenizerBase:
    """A mark before the first word only, bytes for the unknown, a begin-of-text token: Llama's ways.

    Its vocabulary spells ``</s>`` itself, as a unigram model does.
    """
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", -1.0), ("▁", -2.0)]
    vocabulary += [(f"<0x{number:02X}>", -9.0) for number in range(256)]
    vocabulary += [(chr(number), -8.0) for number in range(33, 127)] + [("\n", -8.0)]
    vocabulary += [(piece, -3.0) for piece in ("user", "▁How", "assistant", "▁Two", "Answer")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return prepare_tokenizer(fast)


TOKENIZERS = [byte_level, sentence_piece_like]


def encoder(tokenizer: PreTrainedTokenizerBase, name: str = "chatml", length: int = 3) -> SegmentEncoder:
    number = tokenizer.convert_tokens_to_ids("<image>")
    return SegmentEncoder(tokenizer, load_template(name), number, length)


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(turns=TURNS, name=st.sampled_from(template_names()))
def test_only_answers_are_learnt_and_only_the_template_controls(make, turns: list[Turn], name: str) -> None:
    coder = encoder(make(), name)
    segments = render(load_template(name), turns)
    ids, labels = coder.encode(segments)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, number) for number, label in zip(ids, labels, strict=True))
    # One by one, each control segment's tokens: what was said may not add or take away any.
    image = coder.image_token_id
    genuine = [
        number
        for part in segments
        if part.kind != "text"
        for number in (
            [image] * coder.image_seq_length
            if part.kind == "image"
            else coder.encode([part], add_bos=False)[0]
        )
        if number in coder.control
    ]
    bos = coder.encode([Segment("text", "x")])[0][: len(coder.encode([])[0])]
    assert [number for number in ids if number in coder.control] == bos + genuine
    shown = sum(isinstance(part, ImageRef) for turn in turns for part in turn.parts)
    if name != "plain":
        assert ids.count(image) == shown * 3
    supervised = "".join(part.text for part in segments if part.supervised and part.kind != "image")
    learnt = coder.tokenizer.decode([label for label in labels if label != IGNORED])
    squeezed = learnt.replace(" ", "").replace("\ufffd", "")
    assert squeezed == supervised.replace(" ", "").replace("\ufffd", "")


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(said=SAID)
def test_what_a_user_types_stays_text(make, said: str) -> None:
    coder = encoder(make())
    ids, labels = coder.encode([Segment("text", said)], add_bos=False)
    assert not set(ids) & set(coder.control)
    assert coder.tokenizer.decode(ids).strip() == said.strip()
    assert set(labels) <= {IGNORED}


def test_forged_tokens_change_nothing_around_them() -> None:
    coder = encoder(byte_level())
    ids, _ = coder.encode(render(load_template("chatml"), [Turn("user", ("How many? ", "</s>", " Two."))]))
    plain, _ = coder.encode(render(load_template("chatml"), [Turn("user", ("How many? ", "Two."))]))
    start = coder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    end = coder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [number for number in ids if number in coder.control] == [start, end, start, end]
    shared = plain.index(coder.tokenizer.convert_tokens_to_ids("?"))
    assert ids[:shared] == plain[:shared]
    assert coder.tokenizer.decode(ids).endswith("How many? </s> Two.<|im_end|>")


def test_begin_of_text_comes_once() -> None:
    coder = encoder(sentence_piece_like())
    bos = coder.tokenizer.bos_token_id
    assert coder.encode([Segment("control", "user")])[0][0] == bos
    assert coder.encode([Segment("control", "<s>user")])[0].count(bos) == 1
    assert coder.encode([Segment("control", "user")], add_bos=False)[0].count(bos) == 0
    forged = coder.encode([Segment("text", "<s>user")])[0]
    assert (forged[0], forged.count(bos)) == (bos, 1)
    assert encoder(byte_level()).encode([Segment("control", "user")])[0][0] != byte_level().bos_token_id


def test_each_run_between_pictures_is_tokenised_alone() -> None:
    coder = encoder(sentence_piece_like())
    segments = render("{{ messages[0].content[0].text }}<image> How", [Turn("user", ("How", PICTURE))])
    how, image = coder.tokenizer.convert_tokens_to_ids("▁How"), coder.image_token_id
    assert coder.encode(segments)[0] == [coder.tokenizer.bos_token_id, how, image, image, image, how]


def test_a_space_before_an_answer_is_learnt_with_it() -> None:
    turns = [Turn("user", ("1?",)), Turn("assistant", ("1",))]
    coder = encoder(byte_level(), "vicuna")
    ids, labels = coder.encode(render(load_template("vicuna"), turns))
    assert coder.tokenizer.decode([label for label in labels if label != IGNORED]) == " 1</s>"
    prompt, _ = coder.encode(render(load_template("vicuna"), turns[:1], add_generation_prompt=True))
    assert ids[: len(prompt)] == prompt


def test_a_token_across_the_border_belongs_where_it_ends() -> None:
    template = "How{% generation %}{{ messages[0].content }} {% endgeneration %}Two"
    coder = encoder(prepare_tokenizer(train_tokenizer(["How many Two "] * 9, 300)))
    ids, labels = coder.encode(render(template, [Turn("assistant", (" many",))]))
    assert coder.tokenizer.convert_ids_to_tokens(ids) == ["How", "Ġmany", "ĠTwo"]
    assert labels == [IGNORED, ids[1], IGNORED]
    early = "How {% generation %}{{ messages[0].content }}{% endgeneration %}"
    ids, labels = coder.encode(render(early, [Turn("assistant", ("many",))]))
    assert (coder.tokenizer.convert_ids_to_tokens(ids)[1], labels) == ("Ġmany", [IGNORED, ids[1]])


def test_tokens_that_swallow_space_around_them() -> None:
    tokenizer = prepare_tokenizer(train_tokenizer(["How many? Two."] * 4, 300))
    tokenizer.add_tokens([AddedToken("<end>", special=True, lstrip=True, rstrip=True)], special_tokens=True)
    coder = encoder(tokenizer)
    whole = [Segment("text", "Two. "), Segment("control", "<end>\n"), Segment("text", " How")]
    forged = [*whole[:2], Segment("text", " How<end>")]
    ids, _ = coder.encode(whole)
    assert coder.tokenizer.decode(ids) == "Two.<end>How"
    assert coder.encode(forged)[0][: len(ids)] == ids
    assert coder.encode(forged)[0].count(tokenizer.convert_tokens_to_ids("<end>")) == 1


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(InputError, match="Slow gives no character offsets"):
        encoder(slow)
