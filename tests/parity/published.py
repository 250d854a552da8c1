"""Fixtures made by the authors' own code: which there are, how they convert, and their inputs as ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from vlmix.convert.run import convert
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe_file import with_overrides

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
SENTINEL, IGNORED = -200, -100

# What shapes do not show: the fixtures' towers have other heads and pictures than every published one.
_EAGLE = ["image_size=256", "fusion.grid=[8,8]", "encoders.0.image_size=84", "encoders.0.heads=4"]
CHANGES = {
    "llava-1.5": [],
    "mgm-llama": [],
    "mgm-llama-hd": [],
    "llava-hr": ["encoders.0.heads=4", "encoders.0.image_size=84"],
    "eagle-x2-clip-convnext": [*_EAGLE, "encoders.1.image_size=256"],
    "eagle-x5": [
        *_EAGLE,
        "encoders.1.image_size=256",
        "encoders.4.image_size=256",
        "encoders.4.patches=128",
        "encoders.4.heads=4",
        "encoders.4.head_width=10",
    ],
}
FAMILY = {
    "llava-1.5": "llava",
    "mgm-llama": "mini_gemini",
    "mgm-llama-hd": "mini_gemini",
    "llava-hr": "llava_hr",
    "eagle-x2-clip-convnext": "eagle",
    "eagle-x5": "eagle",
}


@dataclass(frozen=True)
class Batch:
    """A fixture's conversations in our form: placeholders written out, pictures only where a row has one."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


@cache
def tensors(name, which):
    return load_file(GOLDENS / name / f"{which}.safetensors")


@cache
def grad_norms(name):
    return json.loads((GOLDENS / name / "grad_norms.json").read_text())


def converted(name, folder):
    """The fixture as a model folder, and what the conversion says."""
    target = folder / name
    return target, convert(GOLDENS / name, target, change=lambda raw: with_overrides(raw, CHANGES[name]))


def loaded(folder):
    model = VlmixForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def canonical(normalised):
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (CLIP_MEAN, CLIP_STD))
    return normalised * std + mean


def pictures(name):
    """Every canonical picture of the fixture, in 0..1 or beyond: drawn at random, so nothing may clamp."""
    inputs = tensors(name, "inputs")
    return canonical(inputs.get("images_aux", inputs["images"]))


def batch(name, model, side="right"):
    inputs, tokens = tensors(name, "inputs"), model.model.image_seq_length
    kept, ids, labels, first = [], [], [], 0
    for row, mask, target in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
    ):
        row, target = row[mask], target[mask]
        images = int((row == SENTINEL).sum())
        kept += range(first, first + images)
        first += max(images, 1)  # a row of text carries a picture that nothing shows
        repeats = torch.where(row == SENTINEL, tokens, 1)
        ids.append(row.masked_fill(row == SENTINEL, model.config.image_token_id).repeat_interleave(repeats))
        labels.append(target.masked_fill(row == SENTINEL, IGNORED).repeat_interleave(repeats))
    lengths = torch.tensor([len(row) for row in ids])
    padded = pad_sequence(ids, batch_first=True, padding_side=side)
    places = torch.arange(padded.shape[1])
    mask = places < lengths[:, None] if side == "right" else places >= (padded.shape[1] - lengths)[:, None]
    return Batch(
        padded,
        mask.long(),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED, padding_side=side),
        pictures(name)[kept],
    )
