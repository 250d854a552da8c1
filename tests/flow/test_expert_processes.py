"""Experts on two processes: divided among them, or whole and sharded by FSDP2; one process gives the same."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close

from tests import processes
from tests.tiny import PLACEHOLDER, config
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.moe.install import expert_layers

pytestmark = [
    pytest.mark.flow,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers.distributed.expert_parallel") is None,
        reason="these transformers cannot divide experts among processes that hold different rows",
    ),
]
RATE, ROWS, TEXT, EXPERTS = 0.5, 2, 6, 4
DIVIDED, WHOLE = {"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 2}
# Both processes have the same rows: nothing travels, each adds what its experts give.
SHARED = {"tp_size": 2, "ep_size": 2}
MIXTURES = [
    {"place": place, "layers": "all", "count": EXPERTS, "balance": {"switch": 0.0}}
    for place in ("language_model", "encoders.0")
]


def network(folder, layout=None):
    from transformers.distributed import DistributedConfig

    how = {} if layout is None else {"distributed_config": DistributedConfig(**layout)}
    return VlmixForConditionalGeneration.from_pretrained(folder, **how).eval()


def loss_of(model, rows):
    """What these rows add to the loss of all."""
    seen, generator = model.model.image_seq_length, torch.Generator().manual_seed(1)
    words = torch.randint(4, PLACEHOLDER, (ROWS, TEXT), generator=generator)
    ids = torch.cat((torch.full((ROWS, seen), PLACEHOLDER), words), 1)
    given = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == PLACEHOLDER, -100),
        "pixel_values": torch.randint(0, 256, (ROWS, 3, 32, 32), generator=generator, dtype=torch.uint8),
    }
    return model(**{name: value[rows] for name, value in given.items()}, num_items_in_batch=ROWS * TEXT).loss


def step(model, loss, rate):
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=rate, foreach=False).step()


def process(rank, folder, first, second):
    """Train one step in the first layout, save, and resume in the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(rank, rank + 1)

    def total(model):
        loss = loss_of(model, rows)
        everywhere = loss.detach().clone()
        dist.all_reduce(everywhere)
        return loss, everywhere.item()

    model = network(folder / "start", first)
    loss, before = total(model)
    step(model, loss, RATE * 2)  # FSDP2 takes the mean of the processes' gradients
    model.save_pretrained(folder / "gathered")
    model.save_pretrained(folder / "shards", distributed_checkpoint=True)
    resumed = network(folder / "shards", second)
    _, after = total(resumed)
    resumed.save_pretrained(folder / "resumed")
    held = [
        layer.experts.down_proj.to_local().shape[0]
        for each in (model, resumed)
        for layer in expert_layers(each.model.language_model)
    ]
    torch.save({"before": before, "after": after, "held": held}, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def decode(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with torch.no_grad():
        loss = loss_of(network(folder / "start", SHARED), slice(None))
    torch.save(loss, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def start(tmp_path):
    torch.manual_seed(0)
    VlmixForConditionalGeneration(config(experts=MIXTURES)).save_pretrained(tmp_path / "start")
    return tmp_path


@pytest.mark.parametrize(("first", "second"), [(DIVIDED, WHOLE), (WHOLE, DIVIDED)], ids=["divided", "whole"])
def test_two_processes_train_like_one_and_resume_divided_otherwise(start, first, second):
    processes.run_ranks(process, start, first, second)
    alone = network(start / "start")
    before = loss_of(alone, slice(None))
    step(alone, before, RATE)
    after = loss_of(alone, slice(None))
    assert after < before
    for rank in range(2):
        found = torch.load(start / f"found-{rank}.pt")
        # Sums in another order.
        assert_close(torch.tensor([found["before"], found["after"]]), torch.stack((before, after)).detach())
        assert {*found["held"]} == {EXPERTS // 2}
    gathered, resumed = (load_file(start / name / "model.safetensors") for name in ("gathered", "resumed"))
    for name, weight in alone.state_dict().items():
        assert_close(gathered[name], weight, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(gathered[name], resumed[name]), name


def test_processes_with_the_same_rows_each_add_what_their_experts_give(start):
    processes.run_ranks(decode, start)
    alone = loss_of(network(start / "start"), slice(None))
    for rank in range(2):
        assert_close(torch.load(start / f"found-{rank}.pt"), alone.detach())
