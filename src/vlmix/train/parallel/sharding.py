"""Which modules are gathered by themselves, and the division of a model among processes with FSDP2.

Data-parallel copies are the same engine on a mesh of (processes, 1): one code path sums gradients, counts
micro-batches and writes checkpoints, whatever each process holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parallel import ParallelSettings


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    settings: ParallelSettings,
    precision: str,
    undivided: Sequence[nn.Module] = (),
) -> None:
    """Divide ``model`` over ``mesh``: every block of encoders and language model, then the rest as one.

    ``undivided`` modules stay whole, and so do single numbers, which FSDP2 cannot divide; what is divided
    already stays as it is.
    """
    kept = {id(part) for module in undivided for part in module.modules()}
    ignored = {parameter for module in undivided for parameter in module.parameters()}
    ignored |= {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for parameter in ignored:
        parameter.data = parameter.data.to(_place(parameter, mesh))
    ignored |= {parameter for parameter in model.parameters() if isinstance(parameter, DTensor)}
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _policy(settings, precision),
        "ignored_params": ignored,
    }
    if settings.offload == "cpu":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    for module in (module for module in blocks(model) if id(module) not in kept):
        fully_shard(module, reshard_after_forward=settings.reshard_after_forward, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the supervised tokens of all processes, so gradients add up.
            module.set_gradient_divide_factor(1.0)
            # Gloo knows no other reduction.
            module.set_force_sum_reduction_for_comms(True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of ``model`` that run as modules: transformers' layers, and in encoders without
    them the innermost lists of modules of one class.
    """
    found = list(outermost_layers(model))
    inside = {id(part) for module in found for part in module.modules()}
    for encoder in (module for module in model.modules() if isinstance(module, VisionEncoder)):
        if not any(id(part) in inside for part in encoder.modules()):
            found += _innermost_lists(encoder)
    return [module for module in found if any(True for _ in module.parameters())]


def divided_alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters by how they are divided: operations on many tensors at once take those of one division."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of gradients, divided ones and whole ones, as a number every process has."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        groups.setdefault(mesh, []).append(gradient)
    norms = [whole(get_total_norm(group)) for group in groups.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is divided; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor gathered in turn, so that no process ever holds more than one of them whole."""
    for name, tensor in tensors.items():
        yield name, whole(tensor.detach())


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(math.prod(p.shape) * p.element_size() for p in held)


def _place(parameter: nn.Parameter, mesh: DeviceMesh) -> torch.device:
    return parameter.device if parameter.device.type == "meta" else torch.device(mesh.device_type)


def _policy(settings: ParallelSettings, precision: str) -> MixedPrecisionPolicy:
    """In a bf16 stage weights travel as bf16 and gradients as fp32; autocast decides what is computed."""
    if precision != "bf16" or settings.kind == "ddp":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that transformers runs as modules, in order."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from outermost_layers(child)


def _innermost_lists(module: nn.Module) -> list[nn.Module]:
    inner = [found for child in module.children() for found in _innermost_lists(child)]
    if inner or not isinstance(module, nn.ModuleList | nn.Sequential):
        return inner
    return list(module) if len({type(child) for child in module}) == 1 else []
