"""Numbers that are not finite, full disks and bad rows while a run trains."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import one_stage, told, train
from vlmix.core.errors import (
    DataError,
    DiskFullError,
    NonFiniteError,
)
from vlmix.data.sources.synth import Synth
from vlmix.train import stages
from vlmix.train.build import build
from vlmix.train.checkpoint import newest, unique_tensors
from vlmix.train.parallel import pieces

pytestmark = pytest.mark.flow


@pytest.mark.parametrize("where", ["weight", "gradient", "loss"])
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch, where):
    seen = []
    real = stages.StageLoop._backward

    def poisoned(self, *given):
        loss, part = real(self, *given)
        parameters = self.selection.parameters
        if len(seen) == 1:
            before.update({name: p.detach().clone() for name, p in parameters.items()})
            if where == "weight":
                with torch.no_grad():
                    parameters["projector.linear.weight"].view(-1)[0] = torch.inf
                before["projector.linear.weight"].view(-1)[0] = torch.inf
                loss, part = real(self, *given)
            elif where == "gradient":
                parameters["projector.linear.bias"].grad.view(-1)[0] = torch.nan
            else:
                loss = loss * torch.nan
        seen.append(parameters)
        return loss, part

    before = {}
    monkeypatch.setattr(stages.StageLoop, "_backward", poisoned)
    with pytest.raises(NonFiniteError, match=f"stage only, step 2: the {where}.*not changed") as caught:
        train(one_stage(), tmp_path / "run")
    assert caught.value.exit_code == 3
    assert all(torch.equal(before[name], p.detach()) for name, p in seen[-1].items())
    dump = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert dump["step"] == 2
    assert len(dump["samples"]) == 4
    assert all(sample in str(caught.value) for sample in dump["samples"])
    assert len(told(tmp_path / "run")) == 1
    monkeypatch.undo()
    train(one_stage(), tmp_path / "again")
    train(one_stage(), tmp_path / "run", resume=True)
    assert told(tmp_path / "run") == told(tmp_path / "again")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError,
    ],
)
def test_a_full_or_forbidden_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    saved = 0

    def full(tensors, path, *more):
        nonlocal saved
        saved += 1
        save_file(tensors, path, *more)
        if saved == 5:  # the optimizer of the second checkpoint, after its weights
            path.write_bytes(path.read_bytes()[:100])
            if isinstance(error, OSError):
                raise error
            raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "save_file", full)
        with pytest.raises(DiskFullError, match="intact") as caught:
            train(one_stage(), tmp_path / "run")
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1-only-0000001"]
    assert newest(tmp_path / "run" / "checkpoints").state.step == 1
    train(one_stage(), tmp_path / "run", resume=True)
    train(one_stage(), tmp_path / "whole")
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def bad_rows(tmp_path, count, bad):
    """A LLaVA file of ``count`` rows of which the first ``bad`` name a missing picture."""
    sample = Synth(Synth.settings_class(size=1, image_size=48, tasks=("colour",)))[0]
    sample.images[0].open().save(tmp_path / "good.png")
    rows = [
        {
            "id": f"row{i}",
            "image": "missing.png" if i < bad else "good.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": "red" * (1 + i % 3)},
            ],
        }
        for i in range(count)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {"source": {"kind": "llava_json", "path": str(tmp_path / "rows.json"), "images": str(tmp_path)}}


def test_bad_rows_are_counted_and_never_replaced(tmp_path):
    what = one_stage(bad_rows(tmp_path, 20, 3), epochs=2, steps=None, max_bad=0.5)
    text = train(what, tmp_path / "run")
    assert "40 rows read = 34 used + 6 quarantined" in text
    assert sum(row["samples"] for row in told(tmp_path / "run")) == 34
    assert sum(row["quarantined"] for row in told(tmp_path / "run")) == 6
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["id"].partition("#")[0] for row in listed) == ["row0", "row1", "row2"]
    assert all("missing.png" in row["reason"] and row["line"] for row in listed)
    with pytest.raises(DataError, match="max_bad"):
        train(one_stage(bad_rows(tmp_path, 20, 18), epochs=1, steps=None), tmp_path / "too many")


def test_a_step_without_a_good_row_changes_nothing(tmp_path):
    what = one_stage(bad_rows(tmp_path, 8, 8), max_bad=1.0)
    train(what, tmp_path / "run")
    before = unique_tensors(build(what).model)
    after = load_file(tmp_path / "run" / "checkpoints" / "1-only-0000003" / "model.safetensors")
    assert all(row["loss"] is None for row in told(tmp_path / "run"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
