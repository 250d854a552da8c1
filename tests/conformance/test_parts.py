"""Every registered encoder, fusion and projector keeps the contract; no part is named here."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from functools import cache

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny import switch_checkpointing_on
from vlmix.core.adapters import AdapterSettings
from vlmix.core.errors import ImageError, PlanError, RecipeError
from vlmix.core.interfaces import Part
from vlmix.core.parts import ENCODERS, FUSIONS, PROJECTORS, read_part
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec
from vlmix.models.adapters import AdaptedLinear, install_adapters

REGISTRIES = (ENCODERS, FUSIONS, PROJECTORS)
PARTS = [(registry, name) for registry in REGISTRIES for name in registry.names()]
COMBINATIONS = [
    *itertools.product(ENCODERS.names(), repeat=1),
    *itertools.product(ENCODERS.names(), repeat=2),
    tuple(ENCODERS.names()),
]
SIZES = {(4, 4): 6, (6, 2): 8, (1, 16): 6, (3, 5): 4, (2, 3): 12}
MAPS = [VisionSpec(grid, channels) for grid, channels in SIZES.items()]
WIDTH = 12

each_part = pytest.mark.parametrize(("registry", "name"), PARTS, ids=[name for _, name in PARTS])
each_encoder = pytest.mark.parametrize("name", ENCODERS.names())


def tiny(registry, name):
    return registry.get(name).settings_class.tiny()


@cache
def encoder(name, dtype=torch.float32):
    torch.manual_seed(1)
    return randomised(ENCODERS.get(name)(tiny(ENCODERS, name))).eval().requires_grad_(False).to(dtype)


def randomised(part):
    """Move every parameter off its initial value, so that a zero-initialised gate lets gradients through."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return part


def pictures(dtype=torch.float32):
    return torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)


def cases(registry, name):
    """Ways to build the part and run it: (spec promised, build, run) for whatever it does not refuse."""
    cls, settings = registry.get(name), tiny(registry, name)
    if registry is ENCODERS:
        return [(cls.plan(settings), lambda: cls(settings), lambda part, dtype: part(pictures(dtype)))]
    if registry is FUSIONS:
        return [
            fusion_case(cls, settings, names)
            for names in COMBINATIONS
            if plans(cls, settings, specs_of(names))
        ]
    return [projector_case(cls, settings, spec) for spec in MAPS if plans(cls, settings, spec, WIDTH)]


def specs_of(names):
    return [encoder(name).spec for name in names]


def fusion_case(cls, settings, names):
    width = cls.instruction_width(settings)
    asked = torch.randn(2, 1, width or 1, generator=torch.Generator().manual_seed(4))
    context = None if width is None else TextContext(asked, torch.ones(2, 1, dtype=torch.bool))

    def run(part, dtype):
        return part([encoder(name, dtype) for name in names], pictures(dtype), context)

    specs = specs_of(names)
    return cls.plan(settings, specs), lambda: cls(settings, specs), run


def projector_case(cls, settings, spec):
    def run(part, dtype):
        tokens = torch.randn(2, spec.tokens, spec.channels, generator=torch.Generator().manual_seed(3))
        return part(FeatureMap(tokens.to(dtype), spec.grid))

    return cls.plan(settings, spec, WIDTH), lambda: cls(settings, spec, WIDTH), run


def plans(cls, *arguments):
    """Whether the plan takes these; a refusal of any other type than PlanError fails the test."""
    try:
        cls.plan(*arguments)
    except PlanError:
        return False
    return True


@each_part
def test_forward_gives_what_the_plan_promises(registry, name):
    found = cases(registry, name)
    assert found, "every combination was refused"
    for promised, build, run in found:
        out = run(build().eval(), torch.float32)
        assert (out.grid, out.tokens.shape) == (
            promised.grid,
            (2, promised.tokens, promised.channels),
        )


@each_part
def test_planning_makes_no_module(registry, name, monkeypatch):
    specs = {n: encoder(n).spec for n in ENCODERS.names()}

    def refuse(*_, **__):
        raise RuntimeError("a module was built while planning")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    cls = registry.get(name)
    for settings in (tiny(registry, name), cls.settings_class()):
        if registry is ENCODERS:
            assert cls.plan(settings).tokens > 0
        elif registry is FUSIONS:
            plans(cls, settings, [specs[n] for n in COMBINATIONS[-1][:2]])
        else:
            assert any(plans(cls, settings, spec, WIDTH) for spec in MAPS)


@each_part
def test_settings_survive_json_and_refuse_a_misspelt_key(registry, name):
    settings = tiny(registry, name)
    raw = json.loads(settings.model_dump_json())
    assert read_part(registry, raw) == settings
    assert type(settings).model_validate_json(settings.model_dump_json()) == settings
    for key in raw:
        with pytest.raises(RecipeError, match=f"Did you mean '{key}'"):
            read_part(registry, {**raw, key + "x": 1})


@each_part
def test_gradients_are_finite_and_reach_every_parameter(registry, name):
    for _, build, run in cases(registry, name):
        part = randomised(build())
        out = run(part, torch.float32).tokens
        if not out.requires_grad:
            assert not list(part.parameters())
            continue
        (out * torch.randn_like(out)).sum().backward()
        inert = set(part.inert_parameters)
        assert inert <= {key for key, _ in part.named_parameters()}
        for key, parameter in part.named_parameters():
            gradient = torch.zeros(1) if parameter.grad is None else parameter.grad
            assert gradient.isfinite().all(), key
            assert bool(gradient.any()) == (key not in inert), key


@each_part
def test_an_adapter_on_any_linear_takes_part(registry, name):
    """A part that reads a weight past its Linear would leave the adapter without any effect."""
    for _, build, run in cases(registry, name)[:2]:
        whole, part = nn.Module(), randomised(build())
        whole.projector = part
        inert = {f"projector.{key}" for key in part.inert_parameters}
        with suppress(PlanError):  # a part without any Linear
            install_adapters(whole, None, [AdapterSettings(match=["projector.*"], rank=1)])
        layers = {key: layer for key, layer in whole.named_modules() if isinstance(layer, AdaptedLinear)}
        for layer in layers.values():
            layer.begin(list(layer.lora_A))
        out = run(part, torch.float32).tokens
        if layers:
            (out * torch.randn_like(out)).sum().backward()
        for key, layer in layers.items():
            gradient = layer.lora_B["adapter_0"].weight.grad
            reached = gradient is not None and bool(gradient.any())
            assert reached == (f"{key}.weight" not in inert), key


@pytest.mark.slow
@each_part
def test_state_round_trip_and_determinism(registry, name):
    for _, build, run in cases(registry, name):
        first, second = randomised(build()).eval(), build().eval()
        second.load_state_dict(first.state_dict())
        expected = run(first, torch.float32).tokens
        assert torch.equal(run(first, torch.float32).tokens, expected)
        assert torch.equal(run(second, torch.float32).tokens, expected)


@pytest.mark.slow
@each_part
def test_bfloat16_runs_forward_and_backward(registry, name):
    for _, build, run in cases(registry, name):
        part = build().to(torch.bfloat16)
        out = run(part, torch.bfloat16).tokens
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()
        if out.requires_grad:
            out.float().square().mean().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


@pytest.mark.slow
@each_part
def test_shapes_alone_and_reset(registry, name):
    """A part has no value that only a real device could hold, and `reset` leaves it fit to run."""
    for promised, build, run in cases(registry, name):
        with torch.device("meta"):
            assert all(tensor.is_meta for tensor in build().state_dict().values())
        part = build().eval()
        assert isinstance(part, Part)
        with torch.no_grad():
            part.reset()
        assert run(part, torch.float32).tokens.isfinite().all()
        unsaved = {key for key, _ in part.named_buffers()} - set(part.state_dict())
        assert all(key.endswith("position_ids") for key in unsaved), "unsaved buffers come back as garbage"
        assert promised.blocks >= 1


@each_encoder
def test_whole_equals_block_by_block_and_uint8_equals_float(name):
    part = encoder(name)
    levels = (pictures() * 255).round().to(torch.uint8)
    whole = part(levels.float() / 255)
    x = part.embed(levels)
    for index in range(part.spec.blocks):
        x = part.block(index, x)
    assert torch.equal(part.finish(x).tokens, whole.tokens)


@each_encoder
def test_any_picture_size_is_taken_and_anything_else_refused(name):
    part = encoder(name)
    for side in (8, part.settings.image_size, 100):
        assert part(torch.rand(1, 3, side, side)).grid == part.spec.grid
    for wrong in (torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.int64)):
        with pytest.raises(ImageError, match="pixel_values"):
            part(wrong)


@each_encoder
def test_levels_are_as_promised_and_their_stack_is_the_map(name):
    part, promised = encoder(name), ENCODERS.get(name).promise(tiny(ENCODERS, name))
    found, whole = part.levels(pictures()), part(pictures())
    assert [(level.grid, level.tokens.shape[2]) for level in found] == [
        (spec.grid, spec.channels) for spec in promised.levels or (promised,)
    ]
    stacked = torch.cat([level.resampled(whole.grid).tokens for level in found], dim=-1)
    torch.testing.assert_close(stacked, whole.tokens)


@pytest.mark.slow
@each_encoder
def test_the_published_size_runs_on_shapes_alone(name):
    cls = ENCODERS.get(name)
    settings = cls.settings_class()
    with torch.device("meta"):
        part = cls(settings)
        out = part(torch.empty(1, 3, 64, 64))
    assert (out.grid, out.tokens.shape[2]) == (part.spec.grid, part.spec.channels)


class Shell(PreTrainedModel):
    """A transformers model around one encoder, as far as switching checkpointing on needs it."""

    config_class = PreTrainedConfig
    supports_gradient_checkpointing = True
    main_input_name = "pixel_values"

    def __init__(self, part):
        super().__init__(PreTrainedConfig())
        self.part = part


@each_encoder
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name):
    part = randomised(ENCODERS.get(name)(tiny(ENCODERS, name))).train()
    shell, kept, gradients = Shell(part), [], []
    if part.spec.blocks == 1 and not any(hasattr(m, "gradient_checkpointing") for m in part.modules()):
        pytest.skip("one block without depth: nothing to checkpoint")
    for _ in range(2):
        numbers = []
        with saved_tensors_hooks(lambda t, into=numbers: (into.append(t.numel()), t)[1], lambda t: t):
            loss = part(pictures()).tokens.square().mean()
        loss.backward()
        kept.append(sum(numbers))
        gradients.append([p.grad.clone() for p in part.parameters() if p.grad is not None])
        part.zero_grad()
        switch_checkpointing_on(shell)
    assert kept[1] < kept[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
