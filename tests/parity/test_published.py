"""Converted checkpoints against the authors' own code: features, logits, loss, gradients, greedy tokens.

Random weights: agreement with the files on the hub is not shown by this.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.published import (
    CHANGES,
    FAMILY,
    GOLDENS,
    batch,
    converted,
    grad_norms,
    loaded,
    pictures,
    tensors,
)
from vlmix.convert._source import PublishedFolder
from vlmix.convert.export import export
from vlmix.convert.run import convert, recognise
from vlmix.train.recipe_file import with_overrides

GRADIENT = 2e-4  # relative; the authors' noise floor is 7e-5
NOISE = 1e-6

pytestmark = [
    pytest.mark.parity,
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared golden folders are absent"),
]
each = pytest.mark.parametrize("name", list(CHANGES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every fixture converted once."""
    root = tmp_path_factory.mktemp("published")
    return {name: converted(name, root) for name in CHANGES}


@each
def test_every_encoder_and_the_fusion_see_what_the_authors_see(name, folders, agree):
    model, golden, pixels = loaded(folders[name][0]), tensors(name, "outputs"), pictures(name)
    inner = model.model
    with torch.no_grad():
        views, tilings = inner.views.spread(pixels), inner.viewing.tilings(pixels, None)
        scopes = zip(inner.encoders, inner.viewing.scopes, strict=True)
        maps = [encoder(pixels if scope == "picture" else views) for encoder, scope in scopes]
        fused = inner.fusion(inner.viewing.scoped(inner.encoders, pixels, tilings), views)
        agree(
            name, "image_features", model.get_image_features(pixels).pooler_output, golden["image_features"]
        )
    compared = {
        "vision_tower.features": fused if name == "llava-hr" else maps[0],
        "vision_tower_aux.features": maps[-1],
        "slow.features": maps[-1],
        "fused_features": fused,
        **{
            f"encoder.{called}-{size}.out": maps[index]
            for index, (called, size) in enumerate(_EAGLE_TOWERS)
            if index < len(maps)
        },
    }
    for key in compared.keys() & golden.keys():
        found, expected = compared[key], golden[key]
        if name == "mgm-llama-hd" and key == "vision_tower.features":  # they encode the overview last
            expected = expected.unflatten(0, (-1, 5)).roll(1, dims=1).flatten(0, 1)
        if name == "mgm-llama-hd" and key == "vision_tower_aux.features":  # stored at every fourth place
            agree(name, key, found.to_nchw()[:, :, ::4, ::4], expected)
        elif expected.ndim == 4:  # Eagle's Pix2Struct tower brings its map to the common grid by itself
            agree(name, key, found.resampled(expected.shape[2:], "bilinear_corners").to_nchw(), expected)
        else:
            agree(name, key, found.tokens, expected)
    assert compared.keys() & golden.keys()


_EAGLE_TOWERS = [("clip", 448), ("convnext", 1024), ("sam", 1024), ("det", 1024), ("pix2struct", 1024)]


@each
def test_logits_loss_and_gradients_agree(name, folders, agree):
    path, _ = folders[name]
    model, golden = loaded(path), tensors(name, "outputs")
    rows = batch(name, model)
    out = model(**vars(rows))
    shown = rows.attention_mask.bool()
    assert torch.equal(shown, golden["train.attention_mask"])
    agree(name, "logits", out.logits[shown], golden["train.logits"][shown])
    agree(name, "loss", out.loss, golden["train.loss"])
    out.loss.backward()
    names = (
        recognise(PublishedFolder(GOLDENS / name, path))[1].read(PublishedFolder(GOLDENS / name, path)).names
    )
    norms = {
        names.theirs(key): p.grad.norm().item() for key, p in model.named_parameters() if p.grad is not None
    }
    expected = {key: norm for key, norm in grad_norms(name).items() if norm >= NOISE}
    assert len(expected) > 10
    wrong = {
        key: (norms.get(key), norm)
        for key, norm in expected.items()
        if abs(norms.get(key, 0.0) - norm) > GRADIENT * norm
    }
    assert not wrong
    if "left.logits" in golden:
        rows = batch(name, model, side="left")
        with torch.no_grad():
            found = model(**vars(rows)).logits
        shown = rows.attention_mask.bool()
        agree(name, "left.logits", found[shown], golden["left.logits"][shown])


@each
def test_greedy_answers_are_the_authors_token_by_token_also_when_saved_again(name, folders, agree, tmp_path):
    loaded(folders[name][0]).save_pretrained(tmp_path)
    model, golden = loaded(tmp_path), tensors(name, "outputs")
    if "generate.tokens" not in golden:
        pytest.skip("the fixture holds no answers")
    rows = batch(name, model)
    length, images = int(rows.attention_mask[0].sum()), 1
    expected = golden["generate.tokens"]
    with torch.no_grad():
        out = model.generate(
            input_ids=rows.input_ids[:1, :length],
            attention_mask=rows.attention_mask[:1, :length],
            pixel_values=rows.pixel_values[:images],
            max_new_tokens=expected.shape[1],
            min_new_tokens=expected.shape[1],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(out.sequences[:, length:], expected)
    agree(name, "scores", torch.stack(out.logits, dim=1), golden["generate.scores"])


@each
def test_the_way_back_gives_the_same_tensors_and_config(name, folders, tmp_path):
    path, done = folders[name]
    assert done.family == FAMILY[name]
    export(path, tmp_path / "back", FAMILY[name])
    original, back = (
        load_file(folder / "model.safetensors") for folder in (GOLDENS / name, tmp_path / "back")
    )
    assert original.keys() == back.keys()
    assert all(
        torch.equal(original[key], back[key]) and original[key].dtype == back[key].dtype for key in back
    )
    configs = [PublishedFolder(folder, tmp_path).config for folder in (GOLDENS / name, tmp_path / "back")]
    assert configs[0] == configs[1]


@pytest.mark.slow
@each
@torch.no_grad()
def test_a_model_that_forgot_where_it_came_from_is_written_and_read_the_same(name, folders, tmp_path):
    """As after training: only what is in the model is written, such as CLIP up to the block that is read."""
    model = loaded(folders[name][0])
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", FAMILY[name])
    again = convert(
        tmp_path / "written",
        tmp_path / "again",
        change=lambda raw: with_overrides(raw, [*CHANGES[name], *HEADS.get(name, [])]),
    )
    assert again.family == FAMILY[name]
    pixels = pictures(name)
    expected = model.get_image_features(pixels).pooler_output
    assert torch.equal(loaded(tmp_path / "again").get_image_features(pixels).pooler_output, expected)


# What nothing says any more: no folder of CLIP lies beside, and rotations are not stored.
HEADS = {
    **{name: ["encoders.0.heads=4"] for name in ("llava-1.5", "mgm-llama", "mgm-llama-hd")},
    "eagle-x5": [f"encoders.3.{size}" for size in ("image_size=256", "heads=4", "window=4", "rope_grid=4")],
}
