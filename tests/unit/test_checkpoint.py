"""Checkpoints come back bit for bit, are found by checking, and are never half there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlmix.core.errors import CheckpointError
from vlmix.core.files import MANIFEST, sha256, write_manifest
from vlmix.train import checkpoint
from vlmix.train.checkpoint import SCHEMA, RunState, newest
from vlmix.train.optim import build_optimizer
from vlmix.train.trainable import select
from vlmix.train.transforms import TRANSFORMS


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.middle = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, ids):
        return self.head(self.middle(self.norm(self.words(ids))) * torch.rand(3))


class Session:
    """A model in training with everything a checkpoint has to keep."""

    def __init__(self, seed, kind="adamw"):
        torch.manual_seed(seed)
        self.model = Toy()
        self.chosen = select(self.model, {"*": 1e-2})
        self.optimizer = build_optimizer(self.chosen, {"kind": kind}, self.model)

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randint(0, 5, (8,))).square().mean().backward()
        self.optimizer.step()
        return self

    def save(self, root, step, stage_index=0):
        state = RunState(
            stage="only",
            stage_index=stage_index,
            step=step,
            steps=9,
            global_step=step,
            seed=0,
            order="x",
            ledgers={"only": {"used": step}},
            versions=checkpoint.versions(),
        )
        return checkpoint.save(root, state, self.model, self.chosen.parameters, self.optimizer)

    def load(self, folder):
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_optimizer(folder, self.chosen.parameters, self.optimizer)
        checkpoint.load_random_state(folder)
        return self


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_buffers_optimizer_and_randomness_come_back_bit_for_bit(tmp_path, kind):
    one = Session(1, kind).step().step()
    folder = one.save(tmp_path, 2)
    two = Session(2, kind).step().load(folder)
    assert two.model.head.weight is two.model.words.weight
    for _ in range(3):
        one_state, two_state = torch.get_rng_state(), None
        one.step()
        torch.set_rng_state(one_state)
        two.step()
        two_state = torch.get_rng_state()
        assert not torch.equal(one_state, two_state)
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name
    assert set(load_file(folder / "model.safetensors")) == {
        "words.weight",
        "middle.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_the_last_two_are_kept_and_the_chain_is_recorded(tmp_path):
    session = Session(0).step()
    for step in (1, 2, 3):
        session.save(tmp_path, step)
    session.save(tmp_path, 1, stage_index=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1-only-0000003", "2-only-0000001"]
    found = newest(tmp_path)
    assert (found.folder.name, found.problems) == ("2-only-0000001", ())
    assert found.state.ledgers == {"only": {"used": 1}}
    parent = json.loads((found.folder / MANIFEST).read_text())["parent"]
    assert parent == sha256(tmp_path / "1-only-0000003" / MANIFEST)


def test_every_damaged_byte_falls_back_to_the_older_one(tmp_path):
    session = Session(0).step()
    session.save(tmp_path, 1)
    last = session.save(tmp_path, 2)
    torch.manual_seed(0)
    checked = 0
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        for place in torch.randint(0, len(whole), (12,)).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            found = newest(tmp_path)
            # A changed digit of the parent's digest in the manifest is the one change that harms nothing.
            if found.folder == last:
                assert path.name == MANIFEST
            else:
                assert found.state.step == 1
                assert found.problems
                checked += 1
            path.write_bytes(whole)
        path.write_bytes(whole[: len(whole) // 2])
        assert newest(tmp_path).state.step == 1
        path.write_bytes(whole)
    assert checked >= 40
    assert newest(tmp_path).folder == last


def test_nothing_there_is_none_and_nothing_whole_is_an_error(tmp_path):
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None
    folder = Session(0).step().save(tmp_path, 1)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        newest(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = Session(0).step().save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"1 tensors missing \['weight'\].*7 left over"):
        checkpoint.load_weights(folder, nn.Linear(3, 5, bias=False))
    tensors = load_file(folder / "model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    save_file({**tensors, "norm.bias": torch.zeros(4)}, other / "model.safetensors")
    write_manifest(other, SCHEMA)
    session = Session(0)
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"norm\.bias is .*\(4,\), here .*\(3,\)"):
        checkpoint.load_weights(other, session.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in session.model.state_dict().items())
    narrow = Session(0)
    narrow.chosen = select(narrow.model, {"norm.*": 1e-3})
    with pytest.raises(CheckpointError, match=r"middle\.weight.*does not train"):
        checkpoint.load_optimizer(folder, narrow.chosen.parameters, narrow.optimizer)


def test_transforms_are_listed_by_file_and_have_tiny_settings():
    assert TRANSFORMS.names() == ["load_encoder", "reinitialise", "replicate", "upcycle"]
    for name in TRANSFORMS.names():
        assert TRANSFORMS.get(name).settings_class.tiny().kind == name
        assert TRANSFORMS.summary(name)
