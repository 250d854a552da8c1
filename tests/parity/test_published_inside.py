"""What happens inside converted checkpoints, beside the authors' own code: states, adapters, mined values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.parity.published import GOLDENS, batch, converted, loaded, pictures, tensors
from vlmix.convert._source import PublishedFolder
from vlmix.convert.run import recognise
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD, encoder_input
from vlmix.fusion.mixture_of_resolution import (
    MixtureOfResolution,
    MixtureOfResolutionSettings,
    ResolutionAdapter,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared golden folders are absent"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Converted once each, when first asked for."""
    root, kept = tmp_path_factory.mktemp("inside"), {}

    def give(name):
        if name not in kept:
            kept[name] = loaded(converted(name, root)[0])
        return kept[name], tensors(name, "outputs")

    return give


EVERY = ["llava-1.5", "mgm-llama", "mgm-llama-hd", "eagle-x2-clip-convnext", "eagle-x5", "llava-hr"]


@pytest.mark.parametrize("name", EVERY)
def test_what_the_decoder_reads_and_chosen_gradients(name, models, agree, tmp_path):
    model, golden = models(name)
    rows = batch(name, model)
    shown = rows.attention_mask.bool()
    assert torch.equal(rows.labels, golden["train.labels"])
    if "train.inputs_embeds" in golden:
        with torch.no_grad():
            embeds, _ = model.model.embed_inputs(rows.input_ids, rows.pixel_values)
        agree(name, "inputs_embeds", embeds[shown], golden["train.inputs_embeds"][shown])
    folder = PublishedFolder(GOLDENS / name, tmp_path)
    names = recognise(folder)[1].read(folder).names
    model.zero_grad()
    model(**vars(rows)).loss.backward()
    ours = {names.theirs(key): p.grad for key, p in model.named_parameters() if p.grad is not None}
    chosen = [key for key in golden if key.startswith("train.grad.")]
    for key in chosen:
        agree(name, key, ours[f"model.{key.removeprefix('train.grad.')}"], golden[key])


@torch.no_grad()
def test_llavas_states_layer_by_layer_and_cut_short(models, agree):
    name = "llava-1.5"
    model, golden = models(name)
    rows = batch(name, model)
    shown = rows.attention_mask.bool()
    states = model(**vars(rows), output_hidden_states=True).hidden_states
    for layer, (found, expected) in enumerate(zip(states, golden["train.hidden_states"], strict=True)):
        agree(name, f"hidden_states.{layer}", found[shown], expected[shown])
    clip, theirs = model.model.encoders[0], golden["vision_tower.hidden_states_all"]
    x = clip.embed(pictures(name))
    for layer in range(clip.spec.blocks + 1):
        agree(name, f"clip.{layer}", x, theirs[layer])
        x = clip.block(layer, x) if layer < clip.spec.blocks else x
    # Theirs cuts a batch that is too long at the right; what stands before is the same, and so is its loss.
    kept = int(tensors(name, "inputs")["truncate_to"])
    cut = shown[:, :kept]
    labels = rows.labels.clone()
    labels[:, kept:] = -100
    out = model(**{**vars(rows), "labels": labels})
    agree(name, "trunc.logits", out.logits[:, :kept][cut], golden["trunc.logits"][cut])
    agree(name, "trunc.loss", out.loss, golden["trunc.loss"])


@pytest.mark.parametrize("name", ["mgm-llama", "mgm-llama-hd"])
@torch.no_grad()
def test_what_is_mined_in_every_view(name, models, agree):
    model, golden = models(name)
    inner, pixels = model.model, pictures(name)
    views, tilings = inner.views.spread(pixels), inner.viewing.tilings(pixels, None)
    low, high = (e(views) for e in inner.viewing.scoped(inner.encoders, pixels, tilings))
    mined = inner.fusion.merge([low, high]).tokens - low.tokens
    query = inner.fusion.query(low.tokens)
    per_picture = [found.unflatten(0, (len(pixels), -1)) for found in (low.tokens, query, mined)]
    parts = [slice(0, 1), slice(1, None)] if name == "mgm-llama-hd" else [slice(None)]
    for call, part in enumerate(parts):
        for what, found in zip(("query_in", "query_proj", "mined"), per_picture, strict=True):
            key = f"resampler.{call}.{what}"
            agree(name, key, found[:, part].flatten(0, 1), golden[key])


@torch.no_grad()
def test_llava_hrs_adapters(models, agree):
    name = "llava-hr"
    model, golden = models(name)
    fusion, seen = model.model.fusion, {}

    def note(number):
        def hook(module, arguments, output):
            seen[f"adapter.{number}.fast_in"] = arguments[0].tokens
            seen[f"adapter.{number}.fast_out"] = output

        return hook

    for number, adapter in enumerate(fusion.adapters):
        adapter.register_forward_hook(note(number))
        adapter.gate.register_forward_hook(
            lambda _, __, output, key=f"adapter.{number}.gate_pre_tanh": seen.update({key: output})
        )
    fusion.fast_proj.register_forward_hook(lambda _, given, __: seen.update({"fast.features": given[0]}))
    found = fusion(list(model.model.encoders), pictures(name))
    agree(name, "vision_tower.features", found.tokens, golden["vision_tower.features"])
    assert len(seen) == 10
    for key, value in seen.items():
        agree(name, key, value, golden[key])


@pytest.mark.parametrize("branch", ["pool", "up"])
@torch.no_grad()
def test_llava_hrs_modules_where_grids_differ(branch, agree):
    """The slow map has more cells than the fast one, or fewer."""
    name, golden, inputs = "llava-hr", tensors("llava-hr", "outputs"), tensors("llava-hr", "inputs")
    slow = FeatureMap.from_nchw(inputs[f"modules.{branch}.slow"])
    tokens = inputs[f"modules.{branch}.fast"]
    side = round(tokens.shape[1] ** 0.5)
    fast = FeatureMap(tokens, (side, side))

    def weights(module):
        prefix = f"modules.{module}."
        known = ("fast_", "slow_", "gate")
        return {
            key.removeprefix(prefix): value
            for key, value in golden.items()
            if key.startswith(tuple(prefix + start for start in known))
        }

    adapter = ResolutionAdapter(16, 12)
    adapter.load_state_dict(weights("S2FStitchAlignModuleV2"))
    agree(
        name, f"adapter.{branch}", adapter(fast, slow), golden[f"modules.S2FStitchAlignModuleV2.{branch}.out"]
    )
    specs = [VisionSpec(fast.grid, 16, blocks=1, token_blocks=True), VisionSpec(slow.grid, 12)]
    fusion = MixtureOfResolution(MixtureOfResolutionSettings(after=()), specs)
    fusion.load_state_dict(weights("MultiPathAlignModule"))
    path = SimpleNamespace(
        spec=specs[0], embed=lambda _: tokens, block=lambda _, x: x, finish=lambda x: FeatureMap(x, fast.grid)
    )
    found = fusion([path, lambda _: slow], torch.zeros(2, 3, 4, 4))
    agree(name, f"sum.{branch}", found.tokens, golden[f"modules.MultiPathAlignModule.{branch}.out"])


@pytest.mark.parametrize("name", ["eagle-x2-clip-convnext", "eagle-x5"])
@torch.no_grad()
def test_the_picture_eagles_clip_really_gets(name, models, agree):
    model, golden = models(name)
    settings = model.model.encoders[0].settings
    found = encoder_input(pictures(name), settings, torch.float32)
    assert (settings.mean, settings.std) == (CLIP_MEAN, CLIP_STD)
    agree(name, "clip.input", found, golden["encoder.clip.input"])
