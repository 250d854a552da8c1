"""The processes of a run: who this one is, and what they do together. Alone, everything here does nothing."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from vlmix.core.errors import (
    DiskFullError,
    InputError,
    NonFiniteError,
    RecipeError,
    RunLockedError,
    VlmixError,
)
from vlmix.core.parallel import ParallelSettings
from vlmix.moe.parallel import copies_of, divide_experts
from vlmix.train.parallel.heartbeat import Heartbeat, remedy
from vlmix.train.parallel.pieces import local
from vlmix.train.parallel.sharding import shard

_BY_CODE = {
    kind.exit_code: kind for kind in (VlmixError, InputError, NonFiniteError, DiskFullError, RunLockedError)
}
_BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore", "timed out")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process is number ``rank`` of ``world``, on ``device``; made alone, or by ``joined``."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    settings: ParallelSettings = field(default_factory=ParallelSettings)
    mesh: DeviceMesh | None = None
    experts: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes, prints and draws."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest number that any process gives."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.largest(int(flag)))

    def barrier(self) -> None:
        """Wait for all."""
        self.largest(0)

    def share(self, text: str) -> str:
        """What the first process says, on all."""
        if self.world == 1:
            return text
        return self.gather(text if self.is_main else "")[0]

    def gather(self, text: str) -> list[str]:
        """What every process says, in their order."""
        if self.world == 1:
            return [text]
        raw = text.encode()
        size = self.largest(len(raw))
        mine = torch.zeros(size + 8, dtype=torch.uint8)
        mine[:8] = torch.tensor(list(len(raw).to_bytes(8, "little")), dtype=torch.uint8)
        mine[8 : 8 + len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        letters = [bytes(each.tolist()) for each in found]
        return [each[8 : 8 + int.from_bytes(each[:8], "little")].decode() for each in letters]

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """What every process gives, all of one shape, in their order."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous())
        return found

    @contextmanager
    def together(self, what: str) -> Generator[None]:
        """What fails in this block on one process fails on all, each with the same exit code.

        Raises:
            VlmixError: where another process failed and this one did not.

        """
        if self.world == 1:
            yield
            return
        try:
            yield
        except VlmixError as error:
            self.largest(error.exit_code)
            raise
        except Exception:
            self.largest(VlmixError.exit_code)
            raise
        if code := self.largest(0):
            raise _BY_CODE.get(code, VlmixError)(f"{what} failed on another process, which says why")

    @property
    def memory(self) -> torch.device:
        """Where what this process holds of a model is between uses."""
        return torch.device("cpu") if self.settings.offload == "cpu" else self.device

    def prepare(self, model: nn.Module, precision: str = "fp32", undivided: Sequence[nn.Module] = ()) -> None:
        """Divide ``model``, whose trainable parameters are marked, among the processes.

        Its parameters become new objects; those with shapes alone must be given memory and values after it.
        ``undivided`` modules run outside the model too: every process keeps them whole. They do not train.
        """
        if self.experts is not None:
            divide_experts(cast("PreTrainedModel", model.get_submodule("model.language_model")), self.experts)
        if self.mesh is not None:
            shard(model, self.mesh, self.settings, precision, undivided)

    def last_backward(self, model: nn.Module, is_last: bool) -> None:
        """Say before a micro-batch whether it is the last of its step: gradients are summed after it."""
        if isinstance(model, FSDPModule):
            now = is_last or self.settings.reduce == "every"
            model.set_requires_gradient_sync(now)
            model.set_is_last_backward(is_last)

    def sum_undivided(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients that FSDP2 does not, after the last backward pass.

        Those are of what every process holds whole, and of experts that other groups hold too.
        """
        for parameter in parameters if self.world > 1 else ():
            same = copies_of(parameter)
            if parameter.grad is None or (isinstance(parameter, DTensor) and same is None):
                continue
            dist.all_reduce(local(parameter.grad), group=None if same is None else same.get_group())


@contextmanager
def joined(settings: ParallelSettings) -> Generator[Processes]:
    """Join the processes that torchrun started; alone where it did not.

    Raises:
        RecipeError: if ``shard`` or ``experts`` does not divide their number.
        InputError: if they were not started as torchrun does, or have no device each.
        VlmixError: if they do not meet, or another process ended or stopped answering.

    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(device=_device(0), settings=settings)
        return
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    layout = mesh_shape(settings, world)
    patience = timedelta(seconds=settings.patience_s)
    store, rank, world = _met(world, patience)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_backend(device)}"
    alive = PrefixStore("vlmix-alive", store.clone())
    alive.set_timeout(timedelta(seconds=settings.timeout_s))
    try:
        with Heartbeat(alive, rank, world, settings.timeout_s):
            group = PrefixStore("vlmix", store)
            dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=patience)
            names = ("replicate", "shard")[-len(layout) :]
            mesh = init_device_mesh(device.type, layout, mesh_dim_names=names)
            yield Processes(rank, world, device, settings, mesh, _experts_mesh(settings, world, device))
            dist.barrier()
    except RuntimeError as error:
        if not _is_broken(error):
            raise
        raise VlmixError(remedy(f"process {rank}: another process ended or stopped answering")) from error
    finally:
        _leave()


def mesh_shape(settings: ParallelSettings, world: int) -> tuple[int, ...]:
    """Copies and parts: how ``world`` processes stand.

    Raises:
        RecipeError: if ``shard`` or ``experts`` does not divide them.

    """
    if world % settings.experts:
        raise RecipeError(
            f"parallel.experts: {world} processes do not divide into groups of {settings.experts}; start a "
            "multiple of it"
        )
    if settings.kind == "ddp":
        return world, 1
    parts = world if settings.shard == "all" else settings.shard
    if parts == world:
        return (world,)
    if world % parts:
        raise RecipeError(
            f"parallel.shard: {world} processes do not divide into groups of {parts}; start a "
            "multiple of it, or say `shard: all`"
        )
    return world // parts, parts


def _experts_mesh(settings: ParallelSettings, world: int, device: torch.device) -> DeviceMesh | None:
    if settings.experts == 1:
        return None
    layout = (world // settings.experts, settings.experts, 1)
    return init_device_mesh(device.type, layout, mesh_dim_names=("copies", "experts", "rows"))


def _met(world: int, patience: timedelta) -> tuple[Store, int, int]:
    try:
        return next(iter(rendezvous("env://", timeout=patience)))
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE is {world}, but this is not how torchrun starts processes ({error}). Start with "
            "torchrun, or unset WORLD_SIZE"
        ) from None
    except RuntimeError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise VlmixError(
            f"{world} processes did not meet at {where} within {patience.total_seconds():g} s: see whether "
            f"all were started and can reach it ({error})"
        ) from error


def _leave() -> None:
    """Let go of all groups: a thread of theirs that outlives the interpreter may abort the process."""
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    for mesh in [found for found in gc.get_objects() if type(found) is DeviceMesh]:
        # Tables inside torch keep meshes for ever.
        vars(mesh).get("_pg_registry", {}).clear()
    # What is left in cycles, such as a divided model that its owner is done with.
    atexit.register(gc.collect)


def _device(local_rank: int) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if found.index is None and count > 1:
        if local_rank >= count:
            raise InputError(
                f"process {local_rank} of this machine has no {found.type} device of its own; there are "
                f"{count}: start with --nproc-per-node {count}"
            )
        torch.accelerator.set_device_index(local_rank)
    return torch.device(found.type, torch.accelerator.current_device_index())


def _backend(device: torch.device) -> str:
    return cast("str", dist.get_default_backend_for_device(device))


def _is_broken(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _BROKEN)
