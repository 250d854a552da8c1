"""What a method keeps of weights, where several processes hold a part of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from vlmix.train.parallel.pieces import Stored, extent_of, local
from vlmix.train.parallel.processes import Processes
from vlmix.train.parallel.sharding import whole


class Kept(Mapping[str, Tensor]):
    """The tensors that a checkpoint holds under one stem, each read whole when it is asked for."""

    def __init__(self, folder: Path, stem: str) -> None:
        # A stage without a task keeps nothing.
        self._stored = Stored(folder, stem) if any(folder.glob(f"{stem}*.safetensors")) else None

    def __getitem__(self, name: str) -> Tensor:
        """All of the tensor of this name."""
        if self._stored is None or name not in self._stored.names:
            raise KeyError(name)
        return self._stored.read(name)

    def __iter__(self) -> Iterator[str]:
        """Their names in order."""
        return iter(() if self._stored is None else sorted(self._stored.names))

    def __len__(self) -> int:
        """How many there are."""
        return 0 if self._stored is None else len(self._stored.names)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a weight; to change it is to change the weight, unseen by autograd."""
    return local(tensor.detach()).data


def piece_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of what this process would hold of a whole ``tensor`` that is divided as ``like`` is."""
    extent = extent_of(like)
    mine = tensor[tuple(slice(at, at + size) for at, size in zip(extent.start, extent.size, strict=True))]
    # A clone: memory mapped from a file is aligned differently, which can change a sum's last bit.
    return mine.to(held(like).device).clone()


def divided_as(mine: Tensor, like: Tensor) -> Tensor:
    """What every process holds, ``mine`` here, as one tensor that is divided as ``like`` is."""
    if not isinstance(like, DTensor):
        return mine
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The same tensor, divided as ``like`` is; all processes must ask."""
    if isinstance(tensor, DTensor) == isinstance(like, DTensor) and extent_of(tensor) == extent_of(like):
        return tensor
    return divided_as(piece_of(whole(tensor), like), like)


def copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a divided tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    axes = (axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Shard))
    return int(torch.tensor([tensor.device_mesh.size(axis) for axis in axes]).prod())


def input_device(model: PreTrainedModel, processes: Processes) -> torch.device:
    """Where a batch belongs: divided weights may rest elsewhere."""
    return processes.device if processes.world > 1 else model.device


def gather_anew(model: nn.Module) -> None:
    """Let go of weights that were gathered: the next pass gathers them as they are then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
