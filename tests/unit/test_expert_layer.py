"""One expert layer: what it computes, in every kind, and at the edges."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from vlmix.core.errors import PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.core.tape import instructed, recording
from vlmix.moe.install import install, upcycle
from vlmix.moe.kernels import LOOP, kernel_for, loop

WIDTH, INNER, EXPERTS = 10, 14, 4
# float32 sums in another order.
NEAR = 2e-6
KINDS = {
    "ffn": {},
    "narrow ffn": {"width": 6},
    "adapter": {"kind": "adapter", "width": 3},
    "lora": {"kind": "lora", "width": 3},
    "shared": {"shared": 2, "width": 6},
    "residual": {"residual": True},
    "apart": {"noise": 0.1, "redraw": 0.5},
}
ROUTERS = {
    "topk": {"kind": "topk"},
    "sigmoid": {"kind": "sigmoid", "k": 3, "scale": 2.5},
    "deepspeed095": {"kind": "deepspeed095", "eval_capacity_factor": 0.75},
    "expert_choice": {"kind": "expert_choice", "capacity": 1.5},
    "soft": {"kind": "soft", "slots": 2},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Gated(nn.Module):
    def __init__(self, width=WIDTH, inner=INNER):
        super().__init__()
        self.wide, self.side = nn.Linear(width, inner), nn.Linear(width, inner)
        self.back = nn.Linear(inner, width)

    def forward(self, x):
        return self.back(torch.nn.functional.silu(self.side(x)) * self.wide(x))


def plain(width=WIDTH, inner=INNER, outputs=WIDTH):
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, outputs))


def config(implementation="eager"):
    made = PreTrainedConfig()
    made._experts_implementation = implementation
    return made


def layer(network=None, *, spread=0.2, implementation="eager", **changes):
    """An upcycled network whose experts were moved apart by ``spread``."""
    torch.manual_seed(4)
    holder = nn.ModuleDict({"projector": network or plain()}).eval()
    settings = ExpertSettings(**{"place": "projector", "layers": "all", "count": EXPERTS, **changes})
    (made,) = upcycle(holder, settings, config(implementation), causal=False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return made


def tokens(rows=3, count=7, width=WIDTH, dtype=torch.float32):
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def lora_expert(made, expert, x):
    """The dense network with one expert's products added in each Linear."""

    def linear(name, value):
        slot = made.experts.slots[name]
        pair = made.experts.up[slot][expert] @ made.experts.down[slot][expert]
        return made.dense.get_submodule(name)(value) + value @ pair.T * made.experts.scale

    inner = made.shape.activation(linear(made.shape.gate or made.shape.up, x))
    return linear(made.shape.down, inner * linear(made.shape.up, x) if made.shape.gate else inner)


def expected(made, x_BTD):
    """The formula, token by token and expert by expert, from what the layer recorded."""
    with recording() as tape:
        made(x_BTD)
    (routing,) = tape
    x = x_BTD.flatten(0, 1)
    reads = torch.arange(len(x)) if routing.rows is None else routing.rows
    mixing, y = routing.mixing, []
    source = x if mixing is None else (mixing.dispatch @ x_BTD).flatten(0, 1)
    for row, (indices, weights) in enumerate(zip(routing.indices, routing.weights, strict=True)):
        read = source[row if mixing is not None else reads[row]]
        strengths = torch.ones(EXPERTS) if made.strength is None else made.strength
        outputs = [made.experts.alone(e, read[None])[0] * strengths[e] for e in indices]
        y.append(sum(w * output for w, output in zip(weights, outputs, strict=True)))
    y = torch.stack(y)
    y = (
        torch.zeros_like(x).index_add(0, reads, y)
        if mixing is None
        else mixing.combine @ y.unflatten(0, (3, -1))
    )
    y = y.view_as(x_BTD) + sum(network(x_BTD) for network in made.shared)
    if made.settings.kind == "adapter":
        y = y + made.dense(x_BTD)
    if made.blend is not None:
        first, second = made.blend(x_BTD).softmax(-1).unbind(-1)
        y = y * first[..., None] + made.dense(x_BTD) * second[..., None]
    return y


@pytest.mark.parametrize("network", [plain, Gated], ids=["plain", "gated"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_every_kind_of_expert_under_every_router_is_its_formula(kind, router, network):
    made = layer(network(), router=ROUTERS[router], **KINDS[kind])
    torch.testing.assert_close(made(tokens()), expected(made, tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", [plain, Gated], ids=["plain", "gated"])
def test_lora_experts_are_pairs_in_every_linear(network):
    made = layer(network(), router={"kind": "topk", "k": 1}, **KINDS["lora"])
    with recording() as tape:
        found = made(tokens()).flatten(0, 1)
    for token, expert, y in zip(tokens().flatten(0, 1), tape[0].indices[:, 0], found, strict=True):
        torch.testing.assert_close(y, lora_expert(made, expert, token), rtol=1e-5, atol=1e-5)


def test_lora_under_expert_choice_adds_the_shares_of_all_who_chose_a_token():
    made = layer(router={"kind": "expert_choice", "capacity": EXPERTS}, **KINDS["lora"])
    with recording() as tape:
        found = made(tokens())
    shares = tape[0].probabilities
    everybody = made.experts(made.dense, tokens().flatten(0, 1), shares)
    torch.testing.assert_close(found.flatten(0, 1), everybody, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_everything_and_bfloat16_stays_near(kind, router):
    if (kind, router) == ("lora", "soft"):
        pytest.skip("refused")
    made = layer(router=ROUTERS[router], **KINDS[kind]).train()
    x = tokens(count=24).requires_grad_()
    exact = made(x)
    (exact * torch.randn_like(exact)).sum().backward()
    for key, tensor in [("x", x), *made.named_parameters()]:
        assert tensor.grad.isfinite().all(), key
        assert tensor.grad.any(), key
    made.eval()
    exact = made(x)
    rounded = made.to(torch.bfloat16)(x.detach().bfloat16())
    assert rounded.dtype == torch.bfloat16
    # Eight bits a number; a token near a tie may change its expert, so the middle of the differences counts.
    assert (rounded.float() - exact).abs().median() < 0.05 * exact.abs().mean()
    rounded.float().square().mean().backward()


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_rows_of_a_batch_do_not_depend_on_their_number(rows):
    made = layer()
    together = made(tokens(rows))
    alone = torch.cat([made(row[None]) for row in tokens(rows)])
    torch.testing.assert_close(together, alone, rtol=0, atol=NEAR)
    torch.testing.assert_close(made(tokens(rows).flatten(0, 1)), alone.flatten(0, 1), rtol=0, atol=NEAR)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("favourite", [0, EXPERTS - 1])
def test_an_expert_without_a_token_has_a_gradient_of_zero(favourite, implementation):
    """All tokens go to one expert; the others' gradients are zero and not missing."""
    sizes = {"width": 16, "inner": 16}
    network = plain(**sizes, outputs=16)
    made = layer(network, router={"kind": "topk", "k": 1}, implementation=implementation)
    with torch.no_grad():
        made.router.gate.weight.zero_()[favourite] = 1
    x = tokens(width=16).abs()
    with recording() as tape:
        found = made(x)
    assert (tape[0].indices == favourite).all()
    torch.testing.assert_close(
        found.flatten(0, 1),
        made.experts.alone(favourite, x.flatten(0, 1)) * tape[0].weights,
        rtol=1e-5,
        atol=NEAR,
    )
    found.square().sum().backward()
    for parameter in made.experts.parameters():
        worked = parameter.grad.flatten(1).any(1)
        assert worked.tolist() == [expert == favourite for expert in range(EXPERTS)]


@pytest.mark.parametrize(("width", "inner"), [(7, 5), (1, 3), (9, 1), (8, 12)])
def test_odd_widths_run_in_every_precision(width, inner):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        made = layer(plain(width, inner, width).to(dtype), implementation="grouped_mm")
        found = made(tokens(width=width, dtype=dtype))
        assert (found.shape, found.dtype) == ((3, 7, width), dtype)
        found.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in made.experts.parameters())
    assert kernel_for(made.experts, torch.float64, torch.device("cpu"))[0] == LOOP


@pytest.mark.parametrize("network", [plain, Gated], ids=["plain", "gated"])
def test_the_loop_has_exact_gradients(network):
    """Against finite differences in float64, an expert without a row included."""
    experts = layer(network(5, 3) if network is Gated else network(5, 3, 5)).experts.double()
    indices = torch.tensor([[0, 1], [3, 0], [0, 3], [1, 1]])
    names = [name for name, _ in experts.named_parameters()]

    def run(x, weights, *parameters):
        return torch.func.functional_call(
            Looped(experts),
            {f"experts.{n}": p for n, p in zip(names, parameters, strict=True)},
            (x, indices, weights),
        )

    values = [torch.randn(4, 5), torch.rand(4, 2), *experts.parameters()]
    inputs = [value.detach().double().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(run, inputs)


class Looped(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, indices, weights):
        return loop(self.experts, x, indices, weights)


@pytest.mark.parametrize("kind", ["ffn", "adapter", "lora"])
@pytest.mark.parametrize("k", [1, EXPERTS])
def test_a_whole_row_goes_where_its_instruction_sends_it(kind, k):
    made = layer(router={"kind": "instance", "k": k}, scope="instance", **KINDS[kind])
    told = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(8))
    with instructed(told), recording() as tape:
        together = made(tokens())
    assert tape[0].shape == (3, 1)
    assert tape[0].indices.shape == (3, k)
    other = told.clone()
    other[1:] = torch.randn(2, WIDTH)
    with instructed(other):
        torch.testing.assert_close(made(tokens())[0], together[0], rtol=0, atol=NEAR)
    with instructed(told[:1]):
        last = made(tokens()[:1, -1:])
    torch.testing.assert_close(last, together[:1, -1:], rtol=0, atol=NEAR)
    with pytest.raises(PlanError, match="reads the instruction"):
        made(tokens())


def test_without_an_instruction_a_row_is_judged_by_its_mean():
    made = layer(scope="instance")
    with recording() as tape:
        made(tokens())
    logits = tokens().mean(1) @ made.router.gate.weight.T
    torch.testing.assert_close(tape[0].logits, logits, rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    ("changes", "causal", "message"),
    [
        ({"router": {"kind": "expert_choice"}}, True, "in a decoder"),
        ({"router": {"kind": "soft"}}, True, "in a decoder"),
        ({"router": {"kind": "soft"}, "kind": "lora", "width": 2}, False, "mixes tokens"),
        ({"router": {"kind": "expert_choice"}, "scope": "instance"}, False, "compares the tokens"),
        ({"router": {"kind": "instance"}}, False, "scope: instance"),
        ({"scope": "instance"}, True, "the answer included"),
        ({"router": {"kind": "topk", "k": 9}}, True, "9 experts cannot be chosen from 4"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(changes, causal, message):
    settings = ExpertSettings(**{"place": "projector", "layers": "all", **changes})
    with pytest.raises(PlanError, match=message):
        install(nn.ModuleDict({"projector": plain()}), settings, config(), causal=causal)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_without_weights_loads_those_of_another(kind):
    made = layer(router=ROUTERS["sigmoid"], **KINDS[kind])
    with torch.device("meta"):
        holder = nn.ModuleDict({"projector": plain()})
        (empty,) = install(holder, made.settings, config(), causal=False)
        assert empty(torch.empty(2, 5, WIDTH)).shape == (2, 5, WIDTH)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty.eval()(tokens()), made(tokens()))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("redraw", [0.0, 0.5])
def test_copies_start_as_far_apart_as_asked(noise, redraw):
    network = Gated(64, 40)
    made = layer(network, spread=0.0, noise=noise, redraw=redraw)
    dense = layer(network, spread=0.0)
    change = made.experts.first - dense.experts.first
    moved = change.ne(0).any(-1).float().mean(-1)
    assert moved.tolist() == pytest.approx([1.0 if noise else redraw] * EXPERTS)
    if noise and not redraw:
        assert (change / dense.experts.first).std().item() == pytest.approx(noise, rel=0.05)
    if redraw and not noise:
        gate, up = change.ne(0).any(-1).view(EXPERTS, 2, -1).unbind(1)
        assert torch.equal(gate, up), "gate and up of a unit are drawn together"
        assert torch.equal((made.experts.down_proj - dense.experts.down_proj).ne(0).any(1), gate)
        assert len({tuple(row.tolist()) for row in gate}) > 1, "every expert draws its own units"


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_of_tokens_is_its_tokens_in_a_row(kind):
    made, x_BTD = layer(**KINDS[kind]), tokens(count=6)
    assert torch.equal(made(x_BTD.unflatten(1, (2, 3))), made(x_BTD).unflatten(1, (2, 3)))
    assert torch.equal(made(x_BTD[0]), made(x_BTD[:1])[0])
