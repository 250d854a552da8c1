"""The model: any decoder, batches of mixed rows, generation, saving, and the errors it raises."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from tests.tiny import DECODERS, PLACEHOLDER, config, model
from vlmix.core.errors import ImageCountError, PlanError, RecipeError, UnknownNameError
from vlmix.core.interfaces import Part
from vlmix.core.parts import FUSIONS
from vlmix.models.configuration import VlmixConfig


def batch(network, images=(2, 1, 0), text=6):
    """Rows with the given numbers of pictures, padded on the left: ids, mask, pixels."""
    n = network.model.image_seq_length
    generator = torch.Generator().manual_seed(0)
    width = max(images) * n + text
    rows, mask = [], []
    for count in images:
        words = torch.randint(4, PLACEHOLDER, (text,), generator=generator).tolist()
        row = [PLACEHOLDER] * (count * n) + words
        rows.append([0] * (width - len(row)) + row)
        mask.append([0] * (width - len(row)) + [1] * len(row))
    pixels = torch.randint(0, 256, (sum(images), 3, 32, 32), generator=generator, dtype=torch.uint8)
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.tensor(mask), "pixel_values": pixels}


@pytest.fixture(scope="module", params=DECODERS)
def network(request):
    torch.manual_seed(0)
    return model(request.param)


@torch.no_grad()
def test_save_and_load_give_the_same_model(network, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(network)
    assert loaded.config.to_dict().keys() == network.config.to_dict().keys()
    for (name, ours), theirs in zip(network.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    inputs = batch(network)
    # Weights are equal; logits are not bit for bit, because mapped tensors are aligned otherwise.
    assert_close(network(**inputs).logits, loaded(**inputs).logits)


def test_loading_and_saving_keeps_the_names_of_the_weights(network, tmp_path):
    network.save_pretrained(tmp_path / "first")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()


@torch.no_grad()
def test_a_row_answers_alone_as_it_does_among_others(network):
    inputs = batch(network)
    together = network.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    uncached = network.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(together, uncached)
    keep = inputs["attention_mask"][1].bool()
    alone = network.generate(
        input_ids=inputs["input_ids"][1:2, keep],
        pixel_values=inputs["pixel_values"][2:3],
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(alone[0, -4:], together[1, -4:])


@torch.no_grad()
def test_beams_keep_each_row_with_its_own_pictures(network):
    inputs = batch(network, images=(2, 1))
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = network.generate(**inputs, **how)
    keep = inputs["attention_mask"][1].bool()
    alone = network.generate(
        input_ids=inputs["input_ids"][1:2, keep], pixel_values=inputs["pixel_values"][2:3], **how
    )
    assert torch.equal(alone[0, -4:], together[1, -4:])


def test_head_on_supervised_positions_alone_changes_nothing(network):
    inputs = batch(network)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == PLACEHOLDER, -100)
    labels[0, :-3] = labels[1, :-1] = labels[2] = -100
    whole, short = (network(**inputs, labels=labels, logits_to_keep=k) for k in (0, "supervised"))
    assert short.logits.shape[1] < whole.logits.shape[1]
    assert_close(short.loss, whole.loss)
    assert_close(network(**inputs, labels=labels, num_items_in_batch=8).loss, whole.loss / 2)
    for kept in (0, "supervised"):
        network.zero_grad()
        network(**inputs, labels=labels, logits_to_keep=kept).loss.backward()
        assert network.model.encoders[0].tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_pictures_matter_and_text_alone_runs_no_encoder(monkeypatch):
    torch.manual_seed(0)
    network = model()
    inputs = batch(network, images=(1,))
    other = {**inputs, "pixel_values": 255 - inputs["pixel_values"]}
    assert not torch.equal(network(**inputs).logits, network(**other).logits)
    monkeypatch.setattr(network.model, "see", None)
    text = batch(network, images=(0, 0))
    assert network(**text).logits.isfinite().all()
    del text["pixel_values"]
    assert network(**text).logits.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS.names())
def test_plan_is_the_truth_for_every_fusion(fusion):
    raw = {"kind": fusion}
    try:
        planned = config(fusion=raw).plan()
    except PlanError as error:
        assert fusion in str(error)  # noqa: PT017  (a fusion that refuses these two must say who refuses)
        return
    network = model(fusion=raw)
    asked = torch.ones(1, 1, dtype=torch.int64)
    tokens = network.get_image_features(torch.rand(2, 3, 32, 32), instruction_ids=asked).pooler_output
    assert tokens.shape == (2, planned.tokens, network.config.width)


def test_special_values_survive_construction_and_loading(tmp_path, monkeypatch):
    def reset(self):
        with torch.no_grad():
            if not getattr(self.layer.weight, "_is_hf_initialized", False):
                self.layer.weight.fill_(7.0)

    projector = type(model().model.projector)
    first = next(name for name, _ in model().model.projector.named_parameters() if name.endswith("weight"))
    monkeypatch.setattr(
        projector, "layer", property(lambda self: self.get_submodule(first.rpartition(".")[0])), raising=False
    )
    monkeypatch.setattr(projector, "reset", reset)
    network = model()
    assert issubclass(projector, Part)
    assert (network.model.projector.get_parameter(first) == 7).all()
    with torch.no_grad():
        network.model.projector.get_parameter(first).fill_(0.5)
    network.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (loaded.model.projector.get_parameter(first) == 0.5).all()


def test_errors_name_numbers_and_remedy():
    network = model()
    inputs = batch(network, images=(1,))
    n = network.model.image_seq_length
    with pytest.raises(ImageCountError, match=rf"{n} image placeholders, but 2 pictures .* need {2 * n}"):
        network(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ImageCountError, match="0 pictures"):
        network(input_ids=inputs["input_ids"])
    with pytest.raises(UnknownNameError, match="Did you mean 'llama'"):
        VlmixConfig(text_config={"model_type": "lama"})
    broken = config()
    broken.encoders[0]["pach_size"] = 4
    with pytest.raises(RecipeError, match=r"encoders.0.pach_size: unknown key. Did you mean 'patch_size'"):
        broken.plan()
