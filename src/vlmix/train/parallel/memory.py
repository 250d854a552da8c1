"""Memory and values for a model that was divided while it had shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_KNOWN = "_is_hf_initialized"  # transformers leaves what bears this mark alone


def give_memory(model: nn.Module, device: torch.device, rest: torch.device | None = None) -> None:
    """Memory for what this process holds of each tensor, to be filled; tied ones stay tied.

    It is on ``device``, or where parts of weights ``rest`` between uses.
    """
    made: dict[int, Tensor] = {}
    named = model.state_dict(keep_vars=True)
    for tensor in named.values():
        made.setdefault(id(tensor), _empty(tensor, rest if rest and isinstance(tensor, DTensor) else device))
    model.load_state_dict({name: made[id(tensor)] for name, tensor in named.items()}, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))


def compute_buffers(*models: PreTrainedModel) -> None:
    """Values for buffers that no checkpoint holds; what it holds is left alone."""
    for model in models:
        named = model.state_dict(keep_vars=True)
        modules = [module for module in model.modules() if hasattr(module, _KNOWN)]
        for module in modules:
            delattr(module, _KNOWN)
        for tensor in named.values():
            setattr(tensor, _KNOWN, True)
        with torch.random.fork_rng(devices=[]):
            model.initialize_weights()
        # Later stages may draw these anew.
        for holder in (*named.values(), *model.modules()):
            if hasattr(holder, _KNOWN):
                delattr(holder, _KNOWN)


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return tensor
    made: Tensor
    if isinstance(tensor, DTensor):
        local = torch.empty_like(tensor.to_local(), device=device)
        made = DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    else:
        made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
