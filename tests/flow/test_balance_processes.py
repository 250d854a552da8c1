"""Balance of experts on two processes is that of all their rows together."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests import processes
from vlmix.core.experts import BalanceSettings
from vlmix.core.tensors import Routing
from vlmix.moe.balance import RoutingCounts, balance_loss

pytestmark = [pytest.mark.flow, pytest.mark.slow]
ROWS, LENGTH, EXPERTS, K = 4, 6, 4, 2
SETTINGS = BalanceSettings(switch=1.0, z=0.1)


def routing(rows):
    """What ``rows`` of the batch chose; the first rows prefer other experts than the last."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, EXPERTS, generator=generator)
    logits[: ROWS // 2, :, 0] += 3
    logits = logits[rows].flatten(0, 1).requires_grad_()
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.topk(K)
    return Routing((len(range(ROWS)[rows]), LENGTH), logits, probabilities, indices, weights, layer="a")


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = ROWS // 2
    mine = routing(slice(rank * half, (rank + 1) * half))
    loss = balance_loss([mine], SETTINGS, counts=RoutingCounts()) / 2
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, load_file(folder / "whole.safetensors")["loss"])
    torch.testing.assert_close(
        mine.logits.grad, load_file(folder / "whole.safetensors")["gradient"].chunk(2)[rank]
    )
    dist.destroy_process_group()


def test_two_processes_balance_as_one(tmp_path):
    whole = routing(slice(None))
    loss = balance_loss([whole], SETTINGS)
    loss.backward()
    found = {"loss": loss.detach(), "gradient": whole.logits.grad}
    save_file(found, tmp_path / "whole.safetensors")
    processes.run_ranks(process, tmp_path)
