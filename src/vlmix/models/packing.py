"""Several conversations in one row, none of which sees another.

Attention is computed conversation by conversation wherever that is what the decoder's own mask says; a T x T
mask is made only where it is not (a window shorter than a conversation, say). That a decoder keeps
conversations apart at all is not believed but tried, once, on a few words.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from vlmix.core.errors import InputError, PlanError
from vlmix.core.interfaces import Router
from vlmix.core.tape import unrecorded
from vlmix.models.batching import refuse_instructions

if TYPE_CHECKING:
    from vlmix.models.configuration import VlmixConfig

DOCUMENTS: Final = "vlmix_documents"
_WHOLE: Final = "sdpa"
_MOST_HEAD: Final = 256


class Packing(Protocol):
    """A model as far as packing asks it; ``packs_with`` is the attention with which packing was tried."""

    config: VlmixConfig
    packs_with: str | None

    @property
    def decoder(self) -> PreTrainedModel:
        """The language model without its head."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        ...


@dataclass(frozen=True)
class Documents:
    """The conversations of the running row: how long each is, and where each ends (C + 1, from 0)."""

    lengths: tuple[int, ...]
    ends: Tensor


# Told twice, as an argument and here: some decoders do not hand their arguments on to the attention.
_RUNNING: Final[ContextVar[Documents | None]] = ContextVar("documents", default=None)


@contextmanager
def packed_row(
    model: Packing,
    lengths_C: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Generator[dict[str, Any]]:
    """Arguments with which the decoder, called inside the ``with``, keeps conversations apart.

    ``lengths_C`` are theirs, in order; without them, there is nothing to keep apart.

    Raises:
        PlanError: if this model cannot keep them apart.
        InputError: if there is a mask, or no positions.

    """
    if lengths_C is None:
        yield {}
        return
    if attention_mask is not None or position_ids is None:
        raise InputError(
            "a packed row has no attention_mask, and position_ids that begin at 0 with every conversation. "
            "Pass what VlmixProcessor.collate(packed=True) gave"
        )
    check_packing(model)
    with _running(model.decoder, tuple(lengths_C.tolist()), lengths_C.device) as arguments:
        yield arguments


def check_packing(model: Packing) -> None:
    """Refuse a model that cannot keep conversations in one row apart; choose its attention if it can.

    Asked again, it answers at once as long as the attention stays the same.

    Raises:
        PlanError: with what the model decides for a row as a whole, and the remedy.

    """
    settings = model.decoder.config
    if model.packs_with == settings._attn_implementation:
        return
    # Nothing else in a decoder decides for whole rows: ``install`` lets no such router in.
    refuse_instructions(model.config.reads_instruction)
    if settings._attn_implementation == _WHOLE:
        _register()
        settings._attn_implementation = DOCUMENTS
        try:
            apart = _keeps_apart(model)
        except (TypeError, ValueError, RuntimeError):  # a decoder that knows attention by its name
            apart = False
        if not apart:
            settings._attn_implementation = _WHOLE
    if settings._attn_implementation != DOCUMENTS and not _keeps_apart(model):
        raise PlanError(f"packing: {_culprit(model.decoder)}")
    model.packs_with = settings._attn_implementation


def _culprit(decoder: nn.Module) -> str:
    """Why one conversation of a row changes the next."""
    for name, module in decoder.named_modules():
        if isinstance(module, Router) and not module.rowwise:
            return (
                f"{name} ({type(module).__name__}) lets all tokens of a batch compete for experts, so those "
                "of one conversation depend on the others. Leave `batching.pack` off, or take a router whose "
                "tokens decide for themselves, such as {kind: topk}"
            )
    return (
        f"{type(decoder).__name__} carries something from one conversation of a row to "
        "the next (a running state, or positions that do not begin anew). Leave `batching.pack` off"
    )


@contextmanager
def _running(
    decoder: PreTrainedModel, lengths: tuple[int, ...], device: torch.device
) -> Generator[dict[str, Any]]:
    ends_C = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)
    documents = Documents(lengths, ends_C)
    # The first four are transformers' names for its flash attention.
    arguments = {
        "cu_seq_lens_q": ends_C,
        "cu_seq_lens_k": ends_C,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
    if decoder.config._attn_implementation == DOCUMENTS:
        arguments["documents"] = documents
    token = _RUNNING.set(documents)
    try:
        yield arguments
    finally:
        _RUNNING.reset(token)


def keeping_documents(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint``, whose function finds the same conversations when it runs once more for gradients."""

    def run(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        documents = _RUNNING.get()

        def again(*arguments: Any, **named: Any) -> Any:
            token = _RUNNING.set(documents)
            try:
                return function(*arguments, **named)
            finally:
                _RUNNING.reset(token)

        return checkpoint(again, *given, **options)

    return run


def positions_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Positions (1, T) that begin at 0 with every conversation."""
    return torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)


# -- attention --


@cache
def _register() -> None:
    AttentionInterface.register(DOCUMENTS, _attention)
    AttentionMaskInterface.register(DOCUMENTS, _mask)


def _mask(
    *, mask_function: Callable[..., Any] = causal_mask_function, use_vmap: bool = False, **given: Any
) -> Tensor | None:
    """No mask where plain causal attention inside each conversation is what the mask would say."""
    documents = _RUNNING.get()
    if (
        documents is not None
        and not use_vmap
        and given["q_length"] == sum(documents.lengths)
        and _is_causal_inside(mask_function, documents.lengths, given.get("device", "cpu"))
    ):
        return None
    return sdpa_mask(mask_function=mask_function, use_vmap=use_vmap, **given)


def _is_causal_inside(
    mask_function: Callable[..., Any], lengths: Sequence[int], device: torch.device | str
) -> bool:
    """Ask the mask for 3 T of its T x T answers, which no window and no block of sight both ways survives.

    They are: what each token thinks of its conversation's first, what that thinks of each, and what each
    thinks of the one after it.
    """
    lengths_C = torch.tensor(lengths, device=device)
    total = sum(lengths)
    starts_C = lengths_C.cumsum(0) - lengths_C
    start_T = starts_C.repeat_interleave(lengths_C, output_size=total)
    at_T = torch.arange(total, device=device)
    first_T = at_T == start_T
    asked = torch.cat((at_T, start_T, at_T[:-1]))
    about = torch.cat((start_T, at_T, at_T[1:]))
    expected = torch.cat((torch.ones_like(first_T), first_T, torch.zeros_like(first_T[1:])))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return torch.equal(mask_function(zero, zero, asked, about).expand_as(expected), expected)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' own attention, applied to each conversation by itself where there is no mask."""
    documents = documents or _RUNNING.get()
    if documents is None or attention_mask is not None or len(documents.lengths) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    kernel = _varlen()
    kind = _half(query)
    if kernel is not None and kind is not None and not given.get("dropout") and _fits(query, value):
        ends_C, longest = documents.ends, max(documents.lengths)
        q_THD, k_THD, v_THD = (x[0].transpose(0, 1).to(kind) for x in (query, key, value))
        shared = {"scale": given.get("scaling"), "window_size": (-1, 0), "enable_gqa": True}
        return kernel(q_THD, k_THD, v_THD, ends_C, ends_C, longest, longest, **shared).unsqueeze(0), None
    parts = zip(*(x.split(documents.lengths, 2) for x in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, **given)[0] for q, k, v in parts]
    return torch.cat(found, 1), None


def _fits(query: Tensor, value: Tensor) -> bool:
    return query.shape[-1] == value.shape[-1] <= _MOST_HEAD and query.shape[-1] % 8 == 0


def _half(query: Tensor) -> torch.dtype | None:
    """The 16-bit type in which a CUDA kernel would compute, if it would."""
    kind = query.dtype
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
    return kind if query.is_cuda and kind in (torch.float16, torch.bfloat16) else None


@cache
def _varlen() -> Callable[..., Any] | None:
    """Torch's attention over conversations of any length, where this machine and release have it."""
    if not torch.cuda.is_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= known.keys() else None


# -- the trial --


@torch.no_grad()
def _keeps_apart(model: Packing) -> bool:
    """Whether the second of two conversations in a row is as it is alone, whatever the first one is."""
    first, second = 5, 7
    device = model.decoder.device
    embeddings = model.get_input_embeddings()
    words = cast("Tensor", embeddings.weight).shape[0]
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(words, (2 * first + second,), generator=generator).to(device)
    one_T, other_T, last_T = ids_T.split((first, first, second))
    with _evaluating(model.decoder), unrecorded():
        rows = [
            (torch.cat((one_T, last_T)), (first, second)),
            (torch.cat((other_T, last_T)), (first, second)),
        ]
        behind, elsewhere, alone = (
            _states(model, embeddings(row_T), lengths)[:, -second:].float()
            for row_T, lengths in [*rows, (last_T, (second,))]
        )
    kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else alone.dtype
    exact = kind == torch.float32 and model.dtype == torch.float32
    size = alone.abs().max()
    # What another conversation changes is nothing; being alone changes the order of sums.
    return bool(
        ((behind - elsewhere).abs().max() <= 1e-5 * size)
        & ((behind - alone).abs().max() <= (1e-4 if exact else 0.06) * size)
    )


def _states(model: Packing, embeds_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    with _running(model.decoder, lengths, embeds_TD.device) as arguments:
        positions_1T = positions_of(lengths, embeds_TD.device)
        embeds_1TD = embeds_TD.unsqueeze(0)
        return model.decoder(inputs_embeds=embeds_1TD, position_ids=positions_1T, **arguments)[0]


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """Evaluation mode inside the ``with``; afterwards every module is as it was."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode
