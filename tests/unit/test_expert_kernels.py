"""The loop over experts beside transformers' kernels: few rows and many, autocast, absent experts."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vlmix.moe import gathered, memory, precision
from vlmix.moe.experts import StackedExperts
from vlmix.moe.kernels import LOOP, kernel_for, loop

EXPERTS, CHOSEN, WIDTH, INNER = 5, 2, 16, 24
# Rows for each way through the loop: one; few; so many that inner values are made one expert at a time.
ROWS = (1, 9, 300)


def experts(*, gated=True, bias=False, dtype=torch.float32):
    config = PreTrainedConfig()
    config._experts_implementation = None
    torch.manual_seed(0)
    made = StackedExperts(config, EXPERTS, (WIDTH, INNER, WIDTH), nn.SiLU(), gated=gated, bias=(bias, bias))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype)


def rows(count, dtype=torch.float32):
    """Rows, their experts and shares; the last expert is nobody's."""
    generator = torch.Generator().manual_seed(1)
    x_RD = torch.randn(count, WIDTH, generator=generator).to(dtype)
    shares_RK, indices_RK = torch.rand(count, EXPERTS - 1, generator=generator).topk(CHOSEN)
    return x_RD.requires_grad_(), indices_RK, shares_RK.requires_grad_()


def gradients(y_RD, x_RD, shares_RK, made):
    y_RD.double().square().sum().backward()
    found = [x_RD.grad, shares_RK.grad, *(parameter.grad for parameter in made.parameters())]
    x_RD.grad = shares_RK.grad = None
    made.zero_grad()
    return found


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
def test_the_loop_agrees_with_the_kernels(count, kernel, gated, bias):
    made, (x_RD, indices_RK, shares_RK) = experts(gated=gated, bias=bias), rows(count)
    near = {"rtol": 1e-5, "atol": 1e-4}  # sums of up to 300 rows in another order
    ours, theirs = (run(made, x_RD, indices_RK, shares_RK) for run in (loop, ALL_EXPERTS_FUNCTIONS[kernel]))
    assert_close(ours, theirs, **near)
    for mine, other in zip(*(gradients(y, x_RD, shares_RK, made) for y in (ours, theirs)), strict=True):
        assert_close(mine, other, **near)
    with torch.no_grad():
        assert_close(loop(made, x_RD, indices_RK, shares_RK), ours, **near)


@pytest.mark.parametrize("count", ROWS)
def test_autocast_computes_as_a_linear_does_and_gradients_stay_in_the_weights_precision(count):
    made, (x_RD, indices_RK, shares_RK) = experts(bias=True), rows(count)
    with torch.autocast("cpu", torch.bfloat16):
        under = made(x_RD, indices_RK, shares_RK)
        assert under.dtype == nn.Linear(WIDTH, WIDTH)(x_RD).dtype == torch.bfloat16
        with torch.no_grad():
            unkept = made(x_RD, indices_RK, shares_RK)
    low = experts(bias=True, dtype=torch.bfloat16)
    assert_close(under, low(x_RD.bfloat16(), indices_RK, shares_RK), rtol=0, atol=0)
    assert (unkept - under).float().norm() <= 0.01 * under.float().norm()
    exact = gradients(made(x_RD, indices_RK, shares_RK), x_RD, shares_RK, made)
    for near, far in zip(gradients(under, x_RD, shares_RK, made), exact, strict=True):
        assert near.dtype == torch.float32
        assert (near - far).norm() <= 0.02 * far.norm()


def test_choices_of_experts_that_are_elsewhere_add_nothing():
    made, (x_RD, indices_RK, shares_RK) = experts(bias=True), rows(9)
    made._is_expert_parallel = True
    away_RK = torch.zeros(9, CHOSEN, dtype=torch.bool)
    away_RK[2:5, 1] = away_RK[7] = True
    here = loop(made, x_RD, indices_RK, shares_RK * ~away_RK)
    sent = loop(made, x_RD, indices_RK.masked_fill(away_RK, EXPERTS), shares_RK * ~away_RK)
    assert_close(sent, here)
    for mine, other in zip(*(gradients(y, x_RD, shares_RK, made) for y in (sent, here)), strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-4)  # other sums of rows
    with torch.no_grad():
        for some in (slice(None), slice(7, 8)):
            assert_close(
                loop(made, x_RD[some], indices_RK.masked_fill(away_RK, EXPERTS)[some], shares_RK[some]),
                loop(made, x_RD[some], indices_RK[some], (shares_RK * ~away_RK)[some]),
            )


@pytest.mark.parametrize(
    ("act", "gated", "bias", "choices", "copied"),
    [
        (nn.SiLU(), True, False, [[3, 0]], True),
        (ACT2FN["silu"], True, False, [[3, 0]], True),
        (nn.ReLU(), False, False, [[0, 3]], True),
        (nn.SiLU(), True, True, [[3, 0]], False),
        (nn.PReLU(dtype=torch.float64), False, False, [[3, 0]], False),
        (nn.SiLU(), True, False, [[2, 2]], False),
        (nn.SiLU(), True, False, [[1, EXPERTS]], False),
    ],
    ids=[
        "gated",
        "transformers' own",
        "plain",
        "bias",
        "learnt activation",
        "one expert twice",
        "one elsewhere",
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_one_row_through_copies_gives_what_it_gives_without(
    act, gated, bias, choices, copied, trained, monkeypatch
):
    made, (x_1D, _, shares_1K) = experts(gated=gated, bias=bias, dtype=torch.float64), rows(1, torch.float64)
    made.act_fn = act
    made._is_expert_parallel = True
    for parameter in made.parameters(recurse=False):
        parameter.requires_grad_(trained)
    found, steps = [], set()
    for most in (2**20, 0):
        monkeypatch.setattr(gathered, "_SMALL", most)
        y_1D = loop(made, x_1D, torch.tensor(choices), shares_1K)
        steps.add(type(y_1D.grad_fn))
        found.append([y_1D, *gradients(y_1D, x_1D, shares_1K, made)])
    assert (len(steps) == 2) == copied
    assert (found[0][3] is None) != trained
    assert_close(*found)


def test_an_activation_that_overwrites_its_input_spoils_no_gradient():
    made, (x_1D, indices_1K, shares_1K) = experts(), rows(1)
    expected = gradients(loop(made, x_1D, indices_1K, shares_1K), x_1D, shares_1K, made)
    made.act_fn = nn.SiLU(inplace=True)
    assert_close(gradients(loop(made, x_1D, indices_1K, shares_1K), x_1D, shares_1K, made), expected)


@pytest.mark.parametrize("count", [1, 9])
def test_frozen_weights_and_no_rows_need_no_special_care(count):
    made, (x_RD, indices_RK, shares_RK) = experts().requires_grad_(False), rows(count)
    loop(made, x_RD, indices_RK, shares_RK).sum().backward()
    assert x_RD.grad is not None
    assert all(parameter.grad is None for parameter in made.parameters())
    assert loop(made, x_RD[:0], indices_RK[:0], shares_RK[:0]).shape == (0, WIDTH)


def test_the_choice_of_a_kernel_explains_itself():
    made = experts()
    cpu, other = torch.device("cpu"), torch.device("cuda")
    assert kernel_for(made, torch.float32, other) == ("grouped_mm", "")
    reasons = {
        "on a CPU": (torch.float32, cpu),
        "float64": (torch.float64, other),
    }
    for reason, place in reasons.items():
        name, why = kernel_for(made, *place)
        assert name == LOOP
        assert reason in why


@pytest.mark.parametrize("units", [True, False], ids=["matrix units", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_large_bfloat16_products_are_rounded_once_where_a_cpu_is_slow_at_them(units, bias, monkeypatch):
    monkeypatch.setattr(precision, "_lacks_matrix_units", lambda: not units)
    generator = torch.Generator().manual_seed(0)
    for rows_, rounded_once in ((64, not units), (63, False)):
        x, weight, b = (torch.randn(*s, generator=generator) for s in ((rows_, 80), (70, 80), (70,)))
        b = b if bias else None
        with torch.autocast("cpu", torch.bfloat16):  # this is what autocast would round
            native = nn.functional.linear(x, weight, b)
        x, low = x.bfloat16(), [None if w is None else w.bfloat16().float() for w in (weight, b)]
        exact = nn.functional.linear(x.float(), *low).bfloat16() if rounded_once else native
        out = torch.empty(rows_, 70, dtype=torch.bfloat16)
        precision.multiply(x, weight.T, out, b)
        for found in (out, precision.linear(x, weight, b)):
            assert_close(found, exact, rtol=0, atol=0)
        wide = torch.empty(rows_, 70)  # gradients of weights that are kept in float32
        precision.multiply(x, weight.T, wide, b)
        assert_close(wide, exact.float(), rtol=1 / 128, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [[], [0], [5, 40], [63], list(range(64))], ids=str)
@pytest.mark.parametrize("huge", [True, False])
def test_the_gradient_of_a_stack_is_zero_but_where_it_is_written(dtype, chosen, huge, monkeypatch):
    if not huge:
        monkeypatch.setattr(memory, "huge_page", lambda: 0)
    elif not memory.huge_page():
        pytest.skip("no huge pages here")
    stack = torch.empty(64, 256, 256, dtype=dtype)
    before = resident()
    made = memory.gradient_stack(stack, chosen)
    for expert in chosen:
        made[expert] = expert + 1
    touched = resident() - before
    expected = torch.zeros(64)
    expected[chosen] = torch.tensor(chosen, dtype=torch.float32) + 1
    assert_close(made.float().amax((1, 2)), expected)
    assert_close(made.float().amin((1, 2)), expected)
    assert made.shape == stack.shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    if huge and len(chosen) <= 2:
        assert made.data_ptr() % memory.huge_page() == 0
        assert touched <= made.nbytes / 2


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not memory.huge_page(), reason="no huge pages here")
def test_a_parameter_keeps_the_gradient_it_is_given():
    config = PreTrainedConfig()
    config._experts_implementation = None
    made = StackedExperts(config, 64, (256, 256, 256), nn.SiLU(), gated=True)
    made.reset()
    x_RD = torch.ones(1, 256)
    for _ in range(2):
        made(x_RD, torch.tensor([[3, 50]]), torch.ones(1, 2)).sum().backward()
        for parameter in made.parameters():
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() % memory.huge_page() == 0  # a copy would lie anywhere
