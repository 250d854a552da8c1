"""A decoder with published weights: filled by slices, alone or among processes, and never whole on each."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import processes
from tests.flow.test_continual_processes import MODEL, REST, same_weights
from tests.flow.test_parallel_parts import resident
from tests.runs import recipe, stage, synth, told, train
from tests.tiny import text_config
from vlmix.core.errors import CheckpointError
from vlmix.core.parallel import ParallelSettings
from vlmix.models.configuration import CONFIG_MAPPING
from vlmix.train.build import build
from vlmix.train.dividing import build_divisible, divide, has_shapes_alone
from vlmix.train.parallel.processes import joined
from vlmix.train.published import Published
from vlmix.train.solo import running

pytestmark = pytest.mark.flow
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4}


def published(folder, **changes):
    """A decoder and its tokenizer, as hubs have them: in 16 bits, in several files."""
    setup = build(recipe(model={**MODEL, "language_model": {**MODEL["language_model"], **changes}}))
    decoder = setup.model.model.language_model
    decoder.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB" if changes else "20KB")
    setup.processor.tokenizer.save_pretrained(folder)
    return sum(p.numel() * 4 for p in decoder.parameters())


def what(folder, *stages, **more):
    weights = {"weights": str(folder)}
    model = {**MODEL, "language_model": weights, "tokenizer": weights}
    given = stages or (stage("tune", {"*": 1e-2}, synth("colour"), **REST),)
    return recipe(model=model, stages=list(given), **more)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("words", [64, 70])
def test_a_decoder_has_the_weights_that_transformers_loads(kind, words, tmp_path):
    config = text_config("llama") if kind == "mixtral" else text_config(kind)
    config |= {"model_type": kind, **({"num_local_experts": 2} if kind == "mixtral" else {})}
    made = CONFIG_MAPPING[kind](**{key: value for key, value in config.items() if key != "model_type"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    made.vocab_size = words
    decoder = AutoModelForCausalLM.from_config(made)
    source = Published.of(str(tmp_path), decoder, 64)
    assert (source.by_slices(decoder) is None) == (kind != "llama")  # older names or another layout
    source.fill(decoder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor[: len(theirs[name])], theirs[name]), name
        assert tensor.isfinite().all()
    assert bool(source.added) == (words > 64)
    made.hidden_size *= 2
    with pytest.raises(CheckpointError, match="do not fit"):
        Published(str(tmp_path)).fill(AutoModelForCausalLM.from_config(made))


def test_other_parts_are_drawn_alike_whatever_the_decoder(tmp_path):
    published(tmp_path / "words")
    first, again = (build(what(tmp_path / "words"), decoder_by_slices=by) for by in (False, True))
    assert has_shapes_alone(again.model)
    assert not has_shapes_alone(first.model)
    for name, tensor in again.model.state_dict().items():
        if "language_model" not in name:
            assert torch.equal(tensor, first.model.state_dict()[name]), name


def run_each(folder, out):
    train(what(folder), out)


@pytest.mark.slow
def test_two_processes_start_from_published_weights_as_one_does(crew, tmp_path):
    published(tmp_path / "words")
    train(what(tmp_path / "words"), tmp_path / "one")
    crew.run(run_each, tmp_path / "words", tmp_path / "two")
    losses = [[row["loss"] for row in told(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)  # sums in another order
    same_weights(tmp_path / "one/model", tmp_path / "two/model")


def big(folder):
    """Build and divide; tell this process's peak of memory above where it began."""
    with joined(ParallelSettings()) as team:
        given = what(folder)
        before = resident("VmRSS")
        setup = build_divisible(given)
        ran = running(setup, given.stages[0], (0, 0))
        divide(setup, given.stages[0], ran, team, None, looks_ahead=False)
        assert not has_shapes_alone(setup.model)
        (folder / f"peak-{team.rank}").write_text(str(resident("VmHWM") - before))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
def test_no_process_ever_holds_a_published_decoder_whole(tmp_path):
    size = published(tmp_path, **LARGE)
    processes.run(big, tmp_path)
    for rank in range(2):
        # Half of it, the pages of a 16-bit file of 20 MB, and what else a process begins to use.
        assert int((tmp_path / f"peak-{rank}").read_text()) < 0.5 * size + 2**26 < size
