"""How much each weight matters to what a model says: the diagonal of the Fisher information."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlmix.models.losses import IGNORED
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual._base import Batch
from vlmix.train.continual._divided import held, input_device
from vlmix.train.parallel.processes import Processes


def fisher_diagonal(
    model: VlmixForConditionalGeneration,
    named: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    samples: int,
    world: int = 1,
) -> dict[str, Tensor]:
    """Mean over ``samples`` conversations of the squared gradient of log p(answers | rest), by name.

    Every batch is one conversation. All of ``world`` processes look at it: each gives its share of the
    gradient, which is whole only where they are summed, and squares the part of the sum that it holds.
    The model is left in eval mode. Paper: EWC, arXiv:1612.00796, section 2.
    """
    model.eval()
    sums = {name: torch.zeros_like(held(parameter)) for name, parameter in named.items()}
    count = 0
    for batch in islice(batches, samples):
        model.zero_grad(set_to_none=True)
        output = model(**batch, logits_to_keep="supervised", num_items_in_batch=1, use_cache=False)
        loss = output.loss if output.aux_loss is None else output.loss - output.aux_loss
        if loss.requires_grad:
            (loss / world).backward()
        for name, parameter in named.items():
            if parameter.grad is not None:
                gradient = held(parameter.grad)
                if not isinstance(parameter, DTensor):  # held whole, and the same everywhere
                    gradient = gradient * world
                sums[name].addcmul_(gradient, gradient)
        count += 1
    model.zero_grad(set_to_none=True)
    return {name: total / max(count, 1) for name, total in sums.items()}


def own_text(
    model: VlmixForConditionalGeneration, processes: Processes, *, samples: int, tokens: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Texts that the language model writes by itself, each a batch: what it knew before it saw a picture.

    No data of that time is needed: under the model's own distribution the Fisher information is the true one.
    """
    written_ST = _written(model, processes, samples, tokens, seed)
    # All processes look at the same text, whatever their last bits are.
    shared_ST = torch.tensor(json.loads(processes.share(json.dumps(written_ST.tolist()))))
    for ids_T in shared_ST.to(written_ST.device):
        ids_1T = ids_T.unsqueeze(0)
        labels_1T = ids_1T.clone()
        labels_1T[:, 0] = IGNORED
        yield {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), "labels": labels_1T}


@torch.no_grad()
def _written(
    model: VlmixForConditionalGeneration, processes: Processes, samples: int, tokens: int, seed: int
) -> Tensor:
    """Token ids (samples, 1 + tokens), drawn word by word at temperature 1."""
    model.eval()
    config, device = model.config.language, input_device(model, processes)
    known = (config.bos_token_id, config.eos_token_id)
    first = next((token for token in known if isinstance(token, int)), 0)
    generator = torch.Generator().manual_seed(seed)
    written = [torch.full((samples, 1), first, device=device)]
    cache = None
    for _ in range(tokens):
        # Through the whole model: where it is divided, that is what gathers its weights.
        output = model(input_ids=written[-1], past_key_values=cache, use_cache=True)
        cache, chance_SV = output.past_key_values, output.logits[:, -1].float().softmax(-1).cpu()
        chance_SV[:, model.config.image_token_id :][:, :1] = 0  # no picture follows
        written.append(torch.multinomial(chance_SV, 1, generator=generator).to(device))
    return torch.cat(written, 1)
