"""Expert parallelism: the plan, which transformers' ``DistributedConfig`` applies too, and its use here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from vlmix.core.errors import PlanError
from vlmix.moe.experts import StackedExperts


def plan_experts(decoder: PreTrainedModel) -> None:
    """Add every module of stacked experts to the plan of ``decoder``; the models around it take it over.

    Each process keeps its share of a layer's experts, and tokens travel to where theirs are. Experts outside
    the decoder stay whole: a process whose rows have no picture never runs them, and others would wait.
    """
    rules: dict[str, str] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, StackedExperts):
            general = _general(name)
            rules |= {f"{general}.{weight}": "grouped_gemm" for weight, _ in module.named_parameters()}
            rules[general] = "ep_dispatch_experts"
    decoder._ep_plan = {**(decoder._ep_plan or {}), **rules}


def check_experts(decoders: Iterable[PreTrainedModel], processes: int) -> None:
    """Look whether groups of so many processes can divide the experts of ``decoders``, those of all stages.

    Raises:
        PlanError: if none has any, or their number does not divide.

    """
    if find_spec("transformers.distributed.expert_parallel") is None:
        raise PlanError("parallel.experts: these transformers cannot divide experts; install 5.23 or newer")
    counts = {len(weight) for each in decoders for _, weight in _weights(each, _styles(each))}
    if not counts:
        raise PlanError("parallel.experts: no stage's decoder has experts to divide; remove it")
    if uneven := sorted(count for count in counts if count % processes):
        raise PlanError(
            f"parallel.experts: {uneven[0]} experts do not divide among {processes} processes; let it be a "
            "divisor of their number"
        )


def divide_experts(decoder: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leave each process its share of every layer's experts; tokens travel to where theirs are, and back.

    ``mesh`` has the axes ``copies``, ``experts`` and, of size 1, ``rows``: processes that differ on the
    second hold different experts, and all hold different rows of the batch.
    """
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    styles = _styles(decoder)
    apply_expert_parallelism(decoder, mesh["experts"], mesh["rows"], styles)
    layout = mesh["copies", "experts"]
    for name, parameter in list(_weights(decoder, styles)):
        placed = DTensor.from_local(
            cast("DTensor", parameter.detach()).to_local(),
            layout,
            (Replicate(), Shard(0)),
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        owner, _, own = name.rpartition(".")
        made = nn.Parameter(placed, parameter.requires_grad)
        decoder.get_submodule(owner).register_parameter(own, made)


def copies_of(parameter: Tensor) -> DeviceMesh | None:
    """The processes that hold the same experts in ``parameter``; ``None`` where there are none others."""
    if not isinstance(parameter, DTensor) or "experts" not in (parameter.device_mesh.mesh_dim_names or ()):
        return None
    found = parameter.device_mesh["copies"]
    return found if found.size() > 1 else None


def _styles(decoder: PreTrainedModel) -> dict[str, str]:
    """What is done to each module and parameter of experts, the decoder's own and those that were put in."""
    plan_experts(decoder)  # a stage may have put some in since the model was made
    plan = decoder._ep_plan or {}
    names = [name for name, _ in (*decoder.named_parameters(), *decoder.named_modules())]
    return {name: plan[general] for name in names if (general := _general(name)) in plan}


def _weights(decoder: PreTrainedModel, styles: dict[str, str]) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in decoder.named_parameters() if name in styles)


def _general(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
