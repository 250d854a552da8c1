"""``vlmix convert`` on folders made here: transformers' own LLaVA both ways, and folders bad in every way."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import vlmix
from tests.tiny import text_config
from vlmix.cli.main import app
from vlmix.convert._source import PublishedFolder
from vlmix.convert.export import export
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe_file import with_overrides

pytestmark = pytest.mark.flow

PLACEHOLDER = 60
# A tower with other heads than every published one, which shapes do not show.
CHANGES = ["encoders.0.heads=4", f"image_token_id={PLACEHOLDER}"]


@pytest.fixture(scope="module")
def peer():
    """Transformers' LLaVA with random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_config()),
        image_token_index=PLACEHOLDER,
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def published(peer, tmp_path):
    """Its folder."""
    peer.save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def loaded(folder):
    return VlmixForConditionalGeneration.from_pretrained(folder).eval()


def answers(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def prompt():
    ids = torch.tensor([[2, 5, *[PLACEHOLDER] * 16, 7, 8], [2, *[PLACEHOLDER] * 16, 9, 11, 4]])
    return ids, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_transformers_llava_gives_the_same_logits_here_and_the_same_file_back(peer, published, tmp_path):
    done = convert(published, tmp_path / "ours")
    assert (done.family, done.processor) == ("llava_hf", False)
    model, (ids, pixels) = loaded(tmp_path / "ours"), prompt()
    settings = model.model.encoders[0].settings
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (settings.mean, settings.std))
    expected = answers(peer, input_ids=ids, pixel_values=(pixels - mean) / std)
    torch.testing.assert_close(
        answers(model, input_ids=ids, pixel_values=pixels), expected, atol=1e-5, rtol=0
    )
    export(tmp_path / "ours", tmp_path / "back", "llava_hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_from_here_is_written_for_its_families_and_read_again(published, tmp_path):
    convert(published, tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    model.save_pretrained(tmp_path / "trained")  # nothing is known about where it came from
    export(tmp_path / "trained", tmp_path / "llava", "llava")
    written = load_file(tmp_path / "llava" / "model.safetensors")
    # CLIP's last block and norm are not in the model: the authors' code takes them from CLIP, as here.
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_tower.')}": tensor
        for name, tensor in load_file(published / "model.safetensors").items()
        if name.startswith("vision_tower.")
    }
    assert 0 < len(tower.keys() & written.keys()) < len(tower)
    save_file({**tower, **written}, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    again = convert(tmp_path / "llava", tmp_path / "again", change=lambda raw: with_overrides(raw, CHANGES))
    assert again.family == "llava"
    ids, pixels = prompt()
    expected = answers(model, input_ids=ids, pixel_values=pixels)
    assert torch.equal(answers(loaded(tmp_path / "again"), input_ids=ids, pixel_values=pixels), expected)
    with pytest.raises(CheckpointError, match="this model is"):
        export(tmp_path / "trained", tmp_path / "other", "mini_gemini")
    assert not (tmp_path / "other").exists()


def test_a_tower_in_a_folder_of_its_own_is_read_with_its_text_side_left_out(peer, published, tmp_path):
    """As LLaVA-1.5 lies on the hub: pickles, and CLIP whole under the name that the config gives."""
    convert(published, tmp_path / "ours")
    loaded(tmp_path / "ours").save_pretrained(tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "hub", "llava")
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    outside = {name: t for name, t in tensors.items() if "vision_tower" not in name}
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save(outside, tmp_path / "hub" / "pytorch_model.bin")
    flat = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**flat, "mm_vision_tower": "openai/clip"}))
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = peer.config.vision_config.to_dict()
    clip = CLIPModel(
        CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 9}, projection_dim=8)
    )
    clip.vision_model.load_state_dict(peer.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "hub" / "openai" / "clip")
    stored = tmp_path / "hub" / "openai" / "clip"
    torch.save(load_file(stored / "model.safetensors"), stored / "pytorch_model.bin")
    (stored / "model.safetensors").unlink()
    done = convert(tmp_path / "hub", tmp_path / "again", change=lambda raw: with_overrides(raw, CHANGES[1:]))
    assert "the text side of CLIP" in done.kept.values()
    ids, pixels = prompt()
    ours, again = (loaded(tmp_path / name) for name in ("ours", "again"))
    expected = answers(ours, input_ids=ids, pixel_values=pixels)
    assert torch.equal(answers(again, input_ids=ids, pixel_values=pixels), expected)
    export(tmp_path / "again", tmp_path / "back", "llava")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == outside.keys()
    assert all(torch.equal(back[name], outside[name]) for name in back)


def test_weights_are_split_into_shards_and_found_again(published, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmix.convert._shards.SHARD_BYTES", 20_000)
    convert(published, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 2
    assert answers(loaded(tmp_path / "ours"), input_ids=torch.tensor([[2, 5, 7]])).isfinite().all()


def test_with_a_tokenizer_the_model_chats_in_batches(published, tmp_path):
    letters = {chr(ord("a") + i): i + 5 for i in range(26)}
    vocabulary = {"<unk>": 0, "<s>": 2, "</s>": 3, "▁": 4, **letters}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    words.save_pretrained(tmp_path / "words")
    done = convert(published, tmp_path / "ours", tokenizer=tmp_path / "words")
    assert done.processor
    model, processor = vlmix.load(tmp_path / "ours")
    assert processor.tokenizer.pad_token_id == 0
    assert model.config.image_token_id == processor.image_token_id
    picture = {"type": "image", "image": Image.new("RGB", (20, 30))}
    messages = [
        [{"role": "user", "content": [picture, {"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "b c"}]}],
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 3)


class Harmful:
    """What a hostile pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors"


def changed(name, change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
        return name

    return damage


def renamed(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.surprise.weight"] = tensors.pop("language_model.lm_head.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    return "model.surprise.weight"


def escaping(folder):
    index = {"weight_map": {"lm_head.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "../x"


def foreign(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Nobody"]}))
    return "Nobody"


def harmful(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(str(folder / "harm"))))
    return "pytorch_model.bin"


WEIGHT = "multi_modal_projector.linear_1.weight"
DAMAGE = {
    "cut short": cut_short,
    "integers": changed(WEIGHT, lambda tensor: tensor.to(torch.int8)),
    "transposed": changed(
        "language_model.model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.T.contiguous()
    ),
    "not a number": changed(WEIGHT, lambda tensor: tensor.fill_(float("nan"))),
    "left over": renamed,
    "outside": escaping,
    "unknown family": foreign,
    "code": harmful,
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_bad_folder_is_named_refused_and_nothing_is_written(published, tmp_path, kind):
    named = DAMAGE[kind](published)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(app, ["convert", str(published), str(tmp_path / "ours")])
    assert isinstance(result.exception, CheckpointError)
    assert result.exception.exit_code == 2
    assert named in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (published / "harm").exists()


def test_plain_tensors_of_a_bin_file_are_read(peer, published, tmp_path):
    tensors = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    torch.save(tensors, published / "pytorch_model.bin")
    assert convert(published, tmp_path / "ours").moved > 40


def test_a_header_that_is_no_object_is_damaged(tmp_path):
    header = b"[1, 2]"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="header is damaged"):
        _ = PublishedFolder(tmp_path, tmp_path).tensors
