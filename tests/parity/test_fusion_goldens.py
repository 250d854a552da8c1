"""Attention of the fusions against modules of the authors' own code: Deformable DETR, Cambrian."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.parity.published import GOLDENS
from vlmix.convert._names import Names, Rename
from vlmix.core.tensors import FeatureMap
from vlmix.fusion._aggregation import JointLayer, SeparateLayer
from vlmix.fusion._sampling import DeformableAttention, sample_points

NAME = "modules-sva-deform"
FOLDER = GOLDENS / NAME
pytestmark = [
    pytest.mark.parity,
    pytest.mark.golden,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared golden folders are absent"),
]


AGGREGATOR_NAMES = Names(
    [
        Rename("pos_embed_{n}", "places.{n}"),
        Rename("proj_out.linear_1.{rest}", "mlp.0.{rest}"),
        Rename("proj_out.linear_2.{rest}", "mlp.2.{rest}"),
        Rename("weight_mlp.linear_1.{rest}", "weights.0.{rest}"),
        Rename("weight_mlp.linear_2.{rest}", "weights.2.{rest}"),
        Rename("cross_attn.q_proj.{rest}", "query.{rest}"),
        Rename("cross_attn.o_proj.{rest}", "out.{rest}"),
        Rename("cross_attn.k_proj_{n}.{rest}", "keys.{n}.{rest}"),
        Rename("cross_attn.v_proj_{n}.{rest}", "values.{n}.{rest}"),
        Rename("aggregate_{n}.attention_layer.linear_1.{rest}", "readers.{n}.0.{rest}"),
        Rename("aggregate_{n}.attention_layer.linear_2.{rest}", "readers.{n}.2.{rest}"),
        Rename("aggregate_{n}.attention_layer.q_proj.{rest}", "readers.{n}.query.{rest}"),
        Rename("aggregate_{n}.attention_layer.k_proj.{rest}", "readers.{n}.key.{rest}"),
        Rename("aggregate_{n}.attention_layer.v_proj.{rest}", "readers.{n}.value.{rest}"),
        Rename("aggregate_{n}.attention_layer.o_proj.{rest}", "readers.{n}.out.{rest}"),
        Rename("{rest}", "{rest}"),
    ]
)


@cache
def tensors(which):
    return load_file(FOLDER / f"{which}.safetensors")


def weights(prefix):
    return {key.removeprefix(prefix): t for key, t in tensors("model").items() if key.startswith(prefix)}


def by_level(flat, shapes):
    """(B, all cells, …) -> one (B, H, W, …) for each level."""
    parts = flat.split([int(rows * columns) for rows, columns in shapes], dim=1)
    return [part.unflatten(1, tuple(shape.tolist())) for part, shape in zip(parts, shapes, strict=True)]


def test_sampling_is_deformable_detrs(agree):
    inputs, shapes = tensors("inputs"), tensors("inputs")["msda.shapes"]
    values = [level.permute(0, 3, 4, 1, 2) for level in by_level(inputs["msda.value"], shapes)]
    found = sample_points(values, inputs["msda.locations"], inputs["msda.weights"])
    agree(NAME, "msdeform.core", found, tensors("outputs")["msdeform.core"])


class Padded(nn.Module):
    """Deformable DETR's value projection, which clears cells of padding."""

    def __init__(self, linear, padding):
        super().__init__()
        self.linear, self.padding = linear, padding

    def forward(self, x):
        return self.linear(x).masked_fill(self.padding[..., None], 0.0)


def test_the_whole_attention_is_deformable_detrs_and_starts_as_it_does(agree):
    inputs, shapes, stored = tensors("inputs"), tensors("inputs")["msda.shapes"], weights("msdeform.")
    part = DeformableAttention(32, [32, 32], heads=4, points=3)
    assert part.offsets.weight.shape == stored["sampling_offsets.weight"].shape
    part.reset()
    rays = part.offsets.bias.detach().view(4, 2, 3, 2)
    ways = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = ways[:, None, None] * torch.tensor([1.0, 2.0, 3.0])[:, None].expand(4, 2, 3, 1)
    torch.testing.assert_close(rays, expected)
    names = {"offsets": "sampling_offsets", "scores": "attention_weights", "out": "output_proj"}
    for ours, theirs in names.items():
        getattr(part, ours).load_state_dict(
            {"weight": stored[f"{theirs}.weight"], "bias": stored[f"{theirs}.bias"]}
        )
    linear = nn.Linear(32, 32)
    linear.load_state_dict({"weight": stored["value_proj.weight"], "bias": stored["value_proj.bias"]})
    padding = [level.flatten(1) for level in by_level(inputs["msda.padding"], shapes)]
    part.values = nn.ModuleList(Padded(linear, mask) for mask in padding)
    maps = [
        FeatureMap(level.flatten(1, 2), tuple(shape.tolist()))
        for level, shape in zip(by_level(inputs["msda.flat"], shapes), shapes, strict=True)
    ]
    # Their reference points differ by row and level; ours are the same for all, so each row is asked alone.
    reference = inputs["msda.ref2"]
    assert reference.shape == (2, 5, 2, 2)
    offset = part.offsets.bias.detach().clone()
    for row in range(2):
        found = []
        for query in range(5):
            shift = (reference[row, query] - reference[row, query, :1]) * shapes.flip(1)
            bias = offset.view(4, 2, 3, 2) + shift[:, None]
            part.offsets.bias.data = bias.flatten()
            for value, mask in zip(part.values, padding, strict=True):
                value.padding = mask[row : row + 1]
            alone = [FeatureMap(m.tokens[row : row + 1], m.grid) for m in maps]
            asked = inputs["msda.query"][row : row + 1, query : query + 1]
            found.append(part(asked, reference[row, query, :1], alone))
        expected = tensors("outputs")["msdeform.module.points"][row]
        agree(NAME, f"msdeform.module.points.{row}", torch.cat(found, dim=1)[0], expected)


@pytest.mark.parametrize("kind", ["joint", "sep"])
@torch.no_grad()
def test_the_aggregator_is_cambrians(kind, agree):
    """Its layer, with keys hidden as padding; theirs takes every window as a row of a batch."""
    inputs, expected = tensors("inputs"), tensors("outputs")[f"vision_token_sampler.{kind}.out"]
    windows = [inputs[f"sva.kv{i}"][:, None] for i in range(3)]
    masks = [inputs[f"sva.mask{i}"][:, None] for i in range(3)]
    x, context = inputs["sva.queries"], inputs["sva.context"]
    for number in range(2):
        stored = weights(f"vision_token_sampler.{kind}.layers.{number}.")
        layer = {"joint": JointLayer, "sep": SeparateLayer}[kind](32, 32, 48, [24, 32, 32], [1, 4, 16], 16)
        layer.load_state_dict({AGGREGATOR_NAMES.ours(key): tensor for key, tensor in stored.items()})
        x = layer(x, context, windows, masks)
    agree(NAME, f"vision_token_sampler.{kind}.out", x, expected)
