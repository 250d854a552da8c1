"""``VlmixProcessor``: the one way from conversations and pictures to tensors, in training and answering."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final, cast

from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessorMixin

from vlmix.core.errors import ContextLengthError, ImageError, InputError, SampleError, UnknownNameError
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.models.batching import (
    Encoded,
    Opened,
    Side,
    join_pictures,
    packed_row,
    pad_ids,
    pad_instructions,
    padded_rows,
    unpadded,
)
from vlmix.models.configuration import VlmixConfig
from vlmix.models.encoding import IGNORED, SegmentEncoder
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.instruction import instruction_tokens
from vlmix.models.messages import (
    Message,
    give_pictures,
    group_pictures,
    places,
    read_messages,
    split_exchanges,
    without_answer,
)
from vlmix.models.rendering import IMAGE, Scalar, Segment, prompt_text, render, template_variables
from vlmix.models.templates import DEFAULT, load_template, template_names
from vlmix.models.tokenization import prepare_tokenizer

_PROBE: Final = (Turn("user", ("x",)), Turn("assistant", ("x",)))


class VlmixProcessor(ProcessorMixin):
    """Turns conversations with pictures into token ids, labels and pixels, and ids back into text.

    ``image_seq_length`` placeholders stand for one picture (``VlmixConfig.image_seq_length``), or as many as
    its shape asks for where the image processor cuts pictures into views;
    ``chat_template`` is jinja source or the name of a template that comes with vlmix, by default the
    tokenizer's own and else ``chatml``; ``max_length`` is the context in tokens. With ``reads_instruction``
    what the user said goes to the model once more by itself (``VlmixConfig.reads_instruction``). The
    tokenizer is given the image token, and a padding token if it has none.
    """

    def __init__(
        self,
        image_processor: VlmixImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_seq_length: int = 576,
        image_token: str = IMAGE,
        max_length: int | None = None,
        reads_instruction: bool = False,
    ) -> None:
        prepare_tokenizer(tokenizer, image_token)
        self.reads_instruction = reads_instruction
        self.image_seq_length, self.image_token, self.max_length = image_seq_length, image_token, max_length
        self.image_token_id = cast("int", tokenizer.convert_tokens_to_ids(image_token))
        self._kept_encoder: SegmentEncoder | None = None
        template = chat_template or tokenizer.chat_template or DEFAULT
        super().__init__(image_processor, tokenizer, chat_template=_source(template))

    # -- samples: training and judging --

    def encode(self, sample: Sample, *, supervise: bool, max_length: int | None = None) -> Encoded:
        """Encode one sample: with its answers to learn, or as a prompt that ends where the answer begins.

        Where it is longer than ``max_length`` (default: the processor's), whole exchanges are dropped from
        the front; the system text, the last exchange and every kept answer's end stay.

        Raises:
            ContextLengthError: if the last exchange alone is too long.
            SampleError: if it cannot be written, or ``supervise`` finds no answer to learn.

        """
        system, exchanges = split_exchanges(sample.turns if supervise else without_answer(sample.turns))

        @cache
        def without(dropped: int) -> Encoded:
            turns = [*system, *(turn for exchange in exchanges[dropped:] for turn in exchange)]
            return self._encode_turns(sample, turns, supervise, sum(map(len, exchanges[:dropped])))

        limit = self.max_length if max_length is None else max_length
        most = max(len(exchanges) - 1, 0)
        dropped = 0
        if limit is not None and len(without(0).input_ids) > limit:
            dropped = bisect_left(range(most), True, key=lambda n: len(without(n).input_ids) <= limit)
        encoded = without(dropped)
        self._check_length(f"sample {sample.id!r}", encoded.input_ids, limit)
        if supervise and all(label == IGNORED for label in encoded.labels):
            raise SampleError(
                f"sample {sample.id!r} has no answer to learn. Give it an assistant turn.",
                sample_id=sample.id,
            )
        return encoded

    def open_images(self, encoded: Encoded) -> Opened:
        """Open the pictures of one sample; the training loop calls this to quarantine a bad sample alone.

        Raises:
            ImageError: if a picture cannot be read; names the sample.

        """
        return self._open(encoded.images, f"sample {encoded.sample_id!r}")

    def collate(
        self,
        encoded: Sequence[Encoded],
        *,
        padding_side: Side = "right",
        opened: Sequence[Opened] | None = None,
        packed: bool = False,
    ) -> BatchFeature:
        """Put encoded samples into one batch.

        Gives ``input_ids``, ``attention_mask`` and ``labels`` (B, T), padded, or what ``packed_row`` says;
        ``pixel_values`` (I, 3, S, S) uint8 of all pictures in order and what else goes with them (see
        ``Opened``), absent without any. ``opened`` are results of ``open_images``, where that was done.

        Raises:
            ImageError: if a picture cannot be read; names the sample.
            PlanError: if rows that the model must have for each conversation were to be packed.

        """
        opened = [self.open_images(item) for item in encoded] if opened is None else opened
        batch = packed_row(encoded) if packed else padded_rows(encoded, self._pad_id, padding_side)
        return BatchFeature({**batch, **join_pictures(opened)})

    # -- the Hugging Face surface --

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: Side | None = None,
        add_special_tokens: bool = True,
        instruction: str | Sequence[str] | None = None,
    ) -> BatchFeature:
        """Encode prompts in which ``<image>`` marks each picture's place; control tokens in them count.

        ``images`` is one picture, a flat list in order, or a list for each text; ``instruction`` is what the
        user said in it, where the model reads that by itself. Give what a stranger typed to
        ``apply_chat_template(tokenize=True)`` instead: there it stays text.

        Raises:
            InputError: if there is no text, or no instruction for each where the model reads one.
            ImageCountError: if a text has more or fewer placeholders than pictures; names the item.
            ImageError: if a picture cannot be read.
            ContextLengthError: if a text is longer than the processor's ``max_length``.

        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise InputError("the processor was given no text. Give a string or a list of strings.")
        rows = [self._pieces(prompt) for prompt in texts]
        pictures = group_pictures(images, [sum(piece.kind == "image" for piece in row) for row in rows])
        encoder = self._encoder(self._template())
        lengths = [self._lengths(shown, f"item {number}") for number, shown in enumerate(pictures)]
        coded = [
            encoder.encode(row, add_bos=add_special_tokens, image_tokens=counts)[0]
            for row, counts in zip(rows, lengths, strict=True)
        ]
        given = [instruction] if isinstance(instruction, str) else list(instruction or ())
        if self.reads_instruction and len(given) != len(texts):
            raise InputError(
                f"the model reads what the user said: {len(texts)} texts, but {len(given)} instructions. "
                "Pass `instruction`, one for each text, or give messages to apply_chat_template."
            )
        told = self._instructions([[Turn("user", (each,))] for each in given])
        return self._batch(coded, told, pictures, return_tensors, padding, padding_side)

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        images: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: Side | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **variables: Scalar,
    ) -> str | list[str] | BatchFeature | Tensor:
        """Write conversations as prompts, or with ``tokenize`` as a batch for the model.

        Content is a string or a list of parts; an image part has its picture (``image``, ``path``, or a
        local ``url``) or takes the next of ``images``. What anybody said stays text, whatever it looks like.
        ``processor_kwargs`` overrides ``padding``, ``padding_side``, ``return_tensors`` and ``images``;
        ``variables`` are the template's.

        Raises:
            InputError: if a message, option or variable is none that vlmix or the template knows.
            ImageCountError: if there are more or fewer ``images`` than parts without a picture.
            ImageError: if a picture cannot be read or is remote.
            ContextLengthError: if a conversation is longer than the processor's ``max_length``.

        """
        if continue_final_message:
            raise InputError("continue_final_message is not supported. Use add_generation_prompt.")
        is_single = not conversation or isinstance(conversation[0], Mapping)
        conversations = [conversation] if is_single else conversation
        turns = [read_messages(cast("Sequence[Message]", messages)) for messages in conversations]
        options = {"images": images, "return_tensors": return_tensors, "padding": padding}
        options["padding_side"] = padding_side
        _refuse_unknown("processor option", processor_kwargs or {}, options)
        options |= processor_kwargs or {}
        pictures = group_pictures(options.pop("images"), [places(each) for each in turns]) if tokenize else []
        turns = [give_pictures(*both) for both in zip(turns, pictures, strict=True)] if tokenize else turns
        template = self._template(chat_template)
        _refuse_unknown("template variable", variables, template_variables(template))
        rows = [self._render(each, template, add_generation_prompt, variables) for each in turns]
        if not tokenize:
            texts = [prompt_text(row) for row in rows]
            return texts[0] if is_single else texts
        encoder = self._encoder(template)
        shown = [[image for turn in each for image in turn.images] for each in turns]
        lengths = [self._lengths(images, f"item {number}") for number, images in enumerate(shown)]
        coded = [
            encoder.encode(row, image_tokens=counts)[0] for row, counts in zip(rows, lengths, strict=True)
        ]
        batch = self._batch(coded, self._instructions(turns), shown, **options)
        return batch if return_dict else batch["input_ids"]

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer: the tokenizer's end token and the token that ends the template's answers."""
        template = self._template()
        answer = [part for part in self._render(_PROBE, template) if part.turn == 1]
        spoken = max(i for i, part in enumerate(answer) if part.kind == "text")
        closing = self._encoder(template).first_control_id(prompt_text(answer[spoken + 1 :]))
        found = dict.fromkeys([self.tokenizer.eos_token_id, closing])
        return [number for number in found if number is not None]

    @property
    def model_input_names(self) -> list[str]:
        """The names of the tensors this processor makes."""
        names = ["input_ids", "attention_mask", "pixel_values"]
        names += ["instruction_ids", "instruction_mask"] if self.reads_instruction else []
        return names if self.image_processor.views is None else [*names, "image_tilings", "picture_values"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What one placeholder is expanded to; transformers and serving engines ask."""
        if self.image_processor.views is None:
            return self.image_token * self.image_seq_length
        _, _, height, width = image_inputs["image_tilings"][image_idx].tolist()
        return self.image_token * self.image_processor.tokens((width, height))

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and rows of pixels for pictures of the given (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        if self.image_processor.views is not None:
            sizes = [(width, height) for height, width in image_sizes]
            return MultiModalData(
                num_image_tokens=[self.image_processor.tokens(size) for size in sizes],
                num_image_patches=[self.image_processor.count(size) for size in sizes],
            )
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    # -- parts of the above --

    def _template(self, given: str | None = None) -> str:
        return _source(given or self.chat_template or DEFAULT)

    def _render(
        self,
        turns: Sequence[Turn],
        template: str,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Scalar] | None = None,
    ) -> list[Segment]:
        return render(
            template,
            turns,
            add_generation_prompt=add_generation_prompt,
            image_token=self.image_token,
            variables={**self.tokenizer.special_tokens_map, **(variables or {})},
        )

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _encoder(self, template: str) -> SegmentEncoder:
        """The encoder for this template; made again when the tokenizer was exchanged or has grown."""
        old = self._kept_encoder
        fits = old and old.tokenizer is self.tokenizer and old.template == template
        if old is None or not fits or old.size != len(self.tokenizer):
            old = SegmentEncoder(self.tokenizer, template, self.image_token_id, self.image_seq_length)
            self._kept_encoder = old
        return old

    def _encode_turns(
        self, sample: Sample, turns: Sequence[Turn], supervise: bool, dropped_turns: int
    ) -> Encoded:
        template = self._template()
        try:
            segments = self._render(turns, template, not supervise)
        except SampleError as error:
            raise SampleError(f"sample {sample.id!r}: {error}", sample_id=sample.id) from None
        images = tuple(image for turn in turns for image in turn.images)
        counts = self._lengths(images, f"sample {sample.id!r}")
        ids, labels = self._encoder(template).encode(segments, image_tokens=counts)
        labels = labels if supervise else [IGNORED] * len(ids)
        told = self._instructions([turns])
        return Encoded(ids, labels, images, dropped_turns, sample.id, told[0] if told else None)

    def _instructions(self, conversations: Iterable[Sequence[Turn]]) -> list[list[int]]:
        """What the user said in each conversation, or nothing where the model does not read it."""
        if not self.reads_instruction:
            return []
        encoder = self._encoder(self._template())
        return [instruction_tokens(encoder, turns) for turns in conversations]

    def _pieces(self, prompt: str) -> list[Segment]:
        pieces = re.split(f"({re.escape(self.image_token)})", prompt)
        return [
            Segment("image" if piece == self.image_token else "control", piece) for piece in pieces if piece
        ]

    def _check_length(self, item: str, ids: Sequence[int], limit: int | None) -> None:
        if limit is not None and len(ids) > limit:
            shown = sum(token == self.image_token_id for token in ids)
            raise ContextLengthError(
                f"{item}: {len(ids)} tokens ({shown} of them for pictures), but the limit is {limit}. "
                "Shorten the text, show fewer pictures, or raise max_length."
            )

    def _batch(
        self,
        coded: Sequence[list[int]],
        told: Sequence[list[int]],
        pictures: Sequence[Sequence[ImageRef]],
        return_tensors: str | None,
        padding: bool,
        padding_side: Side | None,
    ) -> BatchFeature:
        for number, ids in enumerate(coded):
            self._check_length(f"item {number}", ids, self.max_length)
        opened = [self._open(images, f"item {number}") for number, images in enumerate(pictures)]
        if padding:
            side = padding_side or self.tokenizer.padding_side
            tensors = pad_ids(coded, self._pad_id, side) | pad_instructions(told, self._pad_id, side)
            batch: dict[str, Any] = dict(tensors)
            if return_tensors is None:
                batch = {name: tensor_BT.tolist() for name, tensor_BT in tensors.items()}
        else:
            batch = unpadded(coded, told)
        return BatchFeature({**batch, **join_pictures(opened)}, tensor_type=return_tensors)

    def _lengths(self, images: Sequence[ImageRef], item: str) -> list[int] | None:
        """How many tokens each picture takes, where that varies."""
        if self.image_processor.views is None:
            return None
        try:
            return [self.image_processor.tokens(image.size()) for image in images]
        except ImageError as error:
            raise ImageError(f"{item}: {error}") from None

    def _open(self, images: Sequence[ImageRef], item: str) -> Opened:
        try:
            return self.image_processor.open(images)
        except ImageError as error:
            raise ImageError(f"{item}: {error}") from None


def _refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in set(given) - set(known):
        raise UnknownNameError(what, name, known)


def _source(template: str | dict[str, str]) -> str:
    """Jinja source, from a name, the source itself, or the default of several."""
    text = template["default"] if isinstance(template, dict) else template
    return load_template(text) if text in template_names() else text


AutoProcessor.register(VlmixConfig, VlmixProcessor, exist_ok=True)
