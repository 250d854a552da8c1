"""A decoder whose weights are published: made with shapes alone and filled from its files, tensor by tensor.

Its files are read by slices where they hold its tensors under their own names. Older names and layouts, of
which transformers makes today's, and ids of a hub take a second copy of the decoder in main memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from vlmix.core.errors import CheckpointError
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.parallel.memory import compute_buffers, give_memory
from vlmix.train.parallel.pieces import Stored, extent_of, local

_KNOWN = "_is_hf_initialized"  # transformers leaves what bears this mark alone


@dataclass(frozen=True, slots=True)
class Published:
    """What a decoder is filled from: ``weights``, and rows of words that they lack, ``added``, by name."""

    weights: str
    added: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @staticmethod
    def of(weights: str, decoder: PreTrainedModel, rows: int) -> Published:
        """``rows`` of the vocabulary are published; those that ``decoder`` has beyond are drawn."""
        config, added = decoder.config.get_text_config(), dict[str, Tensor]()
        for name, tensor in unique_tensors(decoder).items():
            if _holds_words(decoder, tensor) and len(tensor) > rows:
                drawn = torch.empty(len(tensor) - rows, *tensor.shape[1:])
                added[name] = drawn.normal_(std=config.initializer_range) if drawn.ndim > 1 else drawn.zero_()
        return Published(weights, added)

    def by_slices(self, decoder: PreTrainedModel) -> Stored | None:
        """The files, where they hold the very tensors of ``decoder``; else ``None``."""
        folder, config = Path(self.weights), decoder.config.get_text_config()
        if not any(folder.glob("model*.safetensors")) or get_checkpoint_conversion_mapping(config.model_type):
            return None
        stored, wanted = Stored(folder, "model"), unique_tensors(decoder)
        aliases = decoder.state_dict(keep_vars=True).keys() - wanted.keys()
        if wanted.keys() - stored.names or stored.names - wanted.keys() - aliases:
            return None
        fits = (stored.shape(name) == self._theirs(name, tensor) for name, tensor in wanted.items())
        return stored if all(fits) else None

    @torch.no_grad()
    def fill(self, decoder: PreTrainedModel) -> None:
        """Give ``decoder``, which has memory and may be divided, its weights.

        Raises:
            CheckpointError: if they do not fit.

        """
        stored = self.by_slices(decoder)
        theirs = self._whole(decoder) if stored is None else {}
        for name, tensor in unique_tensors(decoder).items():
            if stored is not None and name not in self.added:
                stored.fill(name, tensor)
                continue
            found = stored.read(name) if stored is not None else theirs[name]
            if name in self.added:
                found = torch.cat((found.float(), self.added[name]))
            extent = extent_of(tensor)
            parts = tuple(slice(at, at + n) for at, n in zip(extent.start, extent.size, strict=True))
            local(tensor.detach()).copy_(found[parts])

    def _whole(self, decoder: PreTrainedModel) -> dict[str, Tensor]:
        told = {"dtype": torch.float32, "use_safetensors": True}
        theirs = AutoModelForCausalLM.from_pretrained(self.weights, **told).state_dict()
        wanted = unique_tensors(decoder)
        found = {name: tuple(theirs[name].shape) if name in theirs else "missing" for name in wanted}
        wrong = [
            f"{name} is {found[name]}, here {self._theirs(name, tensor)}"
            for name, tensor in wanted.items()
            if found[name] != self._theirs(name, tensor)
        ]
        wrong += [f"{name} is left over" for name in sorted(theirs.keys() - decoder.state_dict().keys())]
        if wrong:
            raise CheckpointError(
                f"language_model.weights {self.weights!r} do not fit: {'; '.join(wrong[:8])}"
            )
        return theirs

    def _theirs(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        added = len(self.added[name]) if name in self.added else 0
        return (len(tensor) - added, *tensor.shape[1:]) if added else tuple(tensor.shape)


def draw_others(model: VlmixForConditionalGeneration, seed: int) -> None:
    """Memory and initial values for everything but the decoder, drawn from ``seed``."""
    inner = model.model
    torch.manual_seed(seed)
    for part in (inner.encoders, inner.views, inner.fusion, inner.projector):
        give_memory(part, torch.device("cpu"))
        for module in part.modules():
            vars(module).pop(_KNOWN, None)
    model.initialize_weights()
    for holder in (*model.parameters(), *model.buffers(), *model.modules()):
        vars(holder).pop(_KNOWN, None)


def fill_decoder(model: VlmixForConditionalGeneration, published: Published) -> None:
    """Memory and weights for the whole decoder of ``model``.

    Raises:
        CheckpointError: if the weights do not fit.

    """
    decoder = model.model.language_model
    give_memory(decoder, torch.device("cpu"))
    published.fill(decoder)
    compute_buffers(model)


def _holds_words(decoder: PreTrainedModel, tensor: Tensor) -> bool:
    """Whether a row of it belongs to a word: the table, or the head's weight or bias."""
    holders = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    return any(tensor is own for holder in holders if holder is not None for own in holder.parameters())
