"""One encoder alone on two processes: steps and weights of one, results that other runs take, resuming."""

import pytest

from tests.flow.test_continual_processes import MODEL, REST, same_weights
from tests.runs import recipe, stage, synth, told, train
from vlmix.core.errors import InterruptedRunError

pytestmark = [pytest.mark.flow, pytest.mark.slow]
ALIGN = [
    stage(
        f"align_{number}",
        {f"encoders.{number}.*": 1e-3, "projector.*": 1e-2, "language_model.*norm*": 1e-3},
        synth(task),
        solo={"encoder": number, "projector": {"kind": projector}},
        **REST,
    )
    for number, (task, projector) in enumerate((("caption", "linear"), ("colour", "pixel_shuffle")))
]
# Encoders that are frozen then look ahead of the model, whole on every process.
JOIN = stage("join", {"projector.*": 1e-2, "language_model.*": 1e-3}, synth("count"), **REST)


def aligned(kind="fsdp", *stages):
    return recipe(model=MODEL, stages=list(stages or (*ALIGN, JOIN)), parallel={"kind": kind})


def run_each(out, kind="fsdp", resume=False):
    train(aligned(kind), out, resume=resume)


def losses(out):
    return [row["loss"] for row in told(out) if not row.get("reused")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train(aligned(), out)
    return out


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_processes_align_what_one_does_and_another_run_takes_it(crew, alone, tmp_path, kind):
    first, again = tmp_path / "first", tmp_path / "again"
    crew.run(run_each, first, kind)
    assert losses(first) == pytest.approx(losses(alone), abs=1e-6)  # sums in another order
    same_weights(alone / "model", first / "model")
    kept = sorted(path.name for path in (tmp_path / ".aligned").iterdir())
    assert len(kept) == 2
    # Of two processes, whose sums are others: a run on one does not take theirs.
    assert not {*kept} & {path.name for path in (alone.parent / ".aligned").iterdir()}
    crew.run(run_each, again, kind)
    assert [bool(row.get("reused")) for row in told(again)] == [True, True, False, False]
    assert losses(again) == losses(first)[-2:]
    last = "model/model.safetensors"
    assert (again / last).read_bytes() == (first / last).read_bytes()
    assert sorted(path.name for path in (tmp_path / ".aligned").iterdir()) == kept


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_inside_a_solo_stage_on_another_number_of_processes(crew, alone, tmp_path, world):
    out = tmp_path / "run"
    if world == 1:
        crew.run(stopped, out)
        train(aligned(), out, resume=True)
    else:
        stopped(out)
        crew.run(run_each, out, "fsdp", True)
    assert losses(out) == pytest.approx(losses(alone), abs=1e-6)
    same_weights(alone / "model", out / "model")


def stopped(out):
    """A run that ends by itself after the first step of the second alignment."""
    from tests.flow.test_resume import stop_after

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(InterruptedRunError):
            run_each(out)
