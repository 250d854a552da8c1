"""What every registered diagnostic owes, run on small untrained mixtures without naming any."""

import json
import math

import pytest
import torch

from tests.tiny import part, text_config
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS
from vlmix.core.sample import Decoding
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._subject import Answering, Questions, Subject
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.models.tokenization import train_tokenizer

FUSED = ("channel_concat", "patch_mining", "mixture_of_vision_experts")


@pytest.fixture(scope="module")
def questions():
    asked = SynthQaSettings(size=4, image_size=48, tasks=("colour", "existence"))
    return Questions(SynthQa(asked), decoding=Decoding(max_new_tokens=3))


def made(fusion, questions):
    """A subject whose model was never trained."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([sample.turns[-1].text for sample in questions.samples], vocab_size=300)
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    config = VlmixConfig(
        text_config=text_config(vocab_size=len(tokenizer), max_position_embeddings=256),
        encoders=[part(ENCODERS, "clip"), part(ENCODERS, "convnext")],
        fusion=part(FUSIONS, fusion),
        projector=part(PROJECTORS, "linear"),
        image_size=32,
        image_token_id=placeholder,
    )
    images = VlmixImageProcessor(image_size=32)
    processor = VlmixProcessor(
        images,
        tokenizer,
        image_seq_length=config.image_seq_length,
        reads_instruction=config.reads_instruction,
    )
    model = VlmixForConditionalGeneration(config)
    return Subject(Answering(fusion, model, processor, questions), subsets=True)


@pytest.fixture(scope="module")
def subjects(questions):
    return [made(fusion, questions) for fusion in FUSED]


@pytest.mark.parametrize("name", DIAGNOSTICS.names())
def test_a_diagnostic_finds_or_says_why_not_and_finds_the_same_again(name, subjects):
    assert DIAGNOSTICS.summary(name).endswith(".")
    said = []
    for subject in subjects:
        weights = {key: value.clone() for key, value in subject.model.state_dict().items()}
        reason = DIAGNOSTICS.get(name)().obstacle(subject)
        if reason:
            assert reason.endswith(".")
            continue
        found, again = (DIAGNOSTICS.get(name)().examine(subject) for _ in range(2))
        said.append(found)
        assert json.dumps(found.data, allow_nan=False) == json.dumps(again.data)
        assert [figure.png for figure in found.figures] == [figure.png for figure in again.figures]
        assert all(figure.png.startswith(b"\x89PNG") and figure.caption for figure in found.figures)
        assert len({figure.name for figure in found.figures}) == len(found.figures)
        assert found.title
        assert found.reading
        assert found.tables
        for table in found.tables:
            assert table.rows
            assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
            assert all(cell not in {"nan", "inf"} for row in table.rows for cell in row)
        after = subject.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in weights.items())
        assert not subject.model.model.fusion._forward_pre_hooks
        assert not any(module._forward_hooks for module in subject.model.model.fusion.modules())
    assert said, f"{name} says nothing about any of {FUSED}"


def test_tokens_come_from_every_picture_at_the_same_places(subjects):
    looks = subjects[0].looks
    assert looks.pictures == 4
    assert looks.common is not None
    assert {len(x) for x in looks.common} == {4 * math.prod(looks.common_grid)}
    assert [x.shape[1] for x in looks.own] == [s.channels for s in subjects[0].model.config.plan().encoders]
