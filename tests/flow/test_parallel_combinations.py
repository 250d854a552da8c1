"""Everything a stage can be told, on two processes: the steps of one process."""

import pytest

from tests.flow.test_parallel_runs import MODEL, words
from tests.processes import FailedError
from tests.runs import recipe, stage, synth, told, train
from vlmix.train.parallel.pieces import Stored

pytestmark = [pytest.mark.flow, pytest.mark.slow]
# Five rows in micro-batches of two leave a process idle in the last round, and some have no picture.
# AdamW divides by the size of a gradient: with the usual eps, one of rounding noise alone moves a weight.
STAGE = {
    "batch_size": 5,
    "micro_batch_size": 2,
    "steps": 3,
    "cache_features": False,
    "save_every_steps": None,
}
EPS = {"eps": 1e-3}
PAIRS = {"match": ["language_model.*", "encoders.0.*"], "rank": 2, "alpha": 4}
EXPERTS = {"layers": "all", "count": 4, "balance": {"switch": 0.01, "z": 0.001}}
ADAPTED = {"*lora_*": 1e-2, "projector.*": 1e-2}
COMBINATIONS = {
    "packed": {"batching": {"pack": True, "tokens": 60}},
    "averaged": {"ema": {"decay": 0.9}},
    "muon": {"optimizer": {"kind": "muon", **EPS}},
    "schedule_free": {"optimizer": {"kind": "schedule_free", **EPS}, "schedule": {"kind": "constant"}},
    "accumulated": {"micro_batch_size": 1},
    "summed_often": {"parallel": {"reduce": "every", "reshard_after_forward": False}},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "lora": {"model": {"adapters": [PAIRS]}, "train": ADAPTED},
    "dora": {"model": {"adapters": [{**PAIRS, "dora": True}]}, "train": ADAPTED},
    "qlora": {"model": {"adapters": [{**PAIRS, "quantise": "nf4"}]}, "train": ADAPTED},
    "experts": {"model": {"experts": [EXPERTS]}},
    "experts_by_bias": {"model": {"experts": [{**EXPERTS, "balance": {"switch": 0.0, "bias_rate": 0.01}}]}},
    "experts_that_see": {"model": {"experts": [{**EXPERTS, "place": "encoders.0"}]}},
    "offloaded": {"parallel": {"offload": "cpu"}},
    "fused_loss": {"fused_loss": True},
    "features": {"train": {"projector.*": 1e-2}, "cache_features": True},
    "spikes": {"spikes": {}, "layer_decay": 0.9},
    "windows": {"batching": {"window": 2}},
    "tiles": {"model": {"views": {"kind": "dynamic", "most": 2}}},
}


def what(folder, *, model=None, parallel=None, train=None, **changes):
    only = stage("only", train or {"*": 1e-2}, synth("colour"), words(folder))
    only |= {"optimizer": EPS, **STAGE, **changes}
    return recipe(model={**MODEL, **(model or {})}, stages=[only], parallel=parallel or {})


def go(given, out):
    train(given, out)
    return told(out)


def rounded(row):
    """The figures that are sums over a step, and what is equal to the last bit."""
    sums = {name: row.pop(name) for name in ("loss", "grad_norm", "balance") if name in row}
    return sums, row


def agree(one, other):
    for first, second in zip(one, other, strict=True):
        (sums, exact), (others, same) = rounded(first), rounded(second)
        assert exact == same
        assert others["loss"] == pytest.approx(sums.pop("loss"), abs=1e-6)
        assert {name: others[name] for name in sums} == pytest.approx(sums, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own compiler warns
@pytest.mark.parametrize("name", COMBINATIONS)
def test_two_processes_do_what_one_does(crew, tmp_path, name):
    if name == "schedule_free":
        pytest.importorskip("schedulefree")
    changes = {**COMBINATIONS[name]}
    parallel = changes.pop("parallel", {})
    one = go(what(tmp_path, **changes), tmp_path / "one")
    assert len({row["loss"] for row in one}) == 3
    for kind in ("fsdp", "ddp"):
        if kind == "ddp" and "offload" in parallel:
            continue
        given = what(tmp_path, **changes, parallel={**parallel, "kind": kind})
        agree([{**row} for row in one], crew.run(go, given, tmp_path / kind)[0])
        first, second = (Stored(tmp_path / each / "model", "model") for each in ("one", kind))
        assert first.names == second.names
        # Sums in another order, and what three updates make of that.
        assert max((first.read(n) - second.read(n)).abs().max().item() for n in first.names) < 1e-3


def test_an_optimizer_that_cannot_be_divided_is_refused(crew, tmp_path):
    for kind in ("fsdp", "ddp"):
        given = what(tmp_path, optimizer={"kind": "adamw8bit"}, parallel={"kind": kind})
        with pytest.raises(FailedError, match="use one process, or another optimizer"):
            crew.run(go, given, tmp_path / kind)
        assert told(tmp_path / kind) == []
