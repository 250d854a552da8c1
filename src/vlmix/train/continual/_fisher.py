"""How much each weight matters to what a model says: the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from vlmix.models.losses import IGNORED
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual._base import Batch


def fisher_diagonal(
    model: VlmixForConditionalGeneration,
    named: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    samples: int,
) -> dict[str, Tensor]:
    """Mean over ``samples`` conversations of the squared gradient of log p(answers | rest), by name.

    Every batch is one conversation. The model is left in eval mode. Paper: EWC, arXiv:1612.00796, section 2.
    """
    model.eval()
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    count = 0
    for batch in islice(batches, samples):
        output = model(**batch, logits_to_keep="supervised", num_items_in_batch=1, use_cache=False)
        loss = output.loss if output.aux_loss is None else output.loss - output.aux_loss
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)
        count += 1
    return {name: total / max(count, 1) for name, total in sums.items()}


def own_text(
    model: VlmixForConditionalGeneration, *, samples: int, tokens: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Texts that the language model writes by itself, each a batch: what it knew before it saw a picture.

    No data of that time is needed: under the model's own distribution the Fisher information is the true one.
    """
    for ids_T in _written(model, samples, tokens, seed):
        ids_1T = ids_T.unsqueeze(0)
        labels_1T = ids_1T.clone()
        labels_1T[:, 0] = IGNORED
        yield {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), "labels": labels_1T}


@torch.no_grad()
def _written(model: VlmixForConditionalGeneration, samples: int, tokens: int, seed: int) -> Tensor:
    """Token ids (samples, 1 + tokens), drawn word by word at temperature 1."""
    model.eval()
    config, language, device = model.config.language, model.model.language_model, model.device
    known = (config.bos_token_id, config.eos_token_id)
    first = next((token for token in known if isinstance(token, int)), 0)
    generator = torch.Generator().manual_seed(seed)
    written = [torch.full((samples, 1), first, device=device)]
    cache = None
    for _ in range(tokens):
        output = language(input_ids=written[-1], past_key_values=cache, use_cache=True)
        cache, chance_SV = output.past_key_values, output.logits[:, -1].float().softmax(-1).cpu()
        chance_SV[:, model.config.image_token_id :][:, :1] = 0  # no picture follows
        written.append(torch.multinomial(chance_SV, 1, generator=generator).to(device))
    return torch.cat(written, 1)
