"""What each method of continual learning adds to the loss, written out; what it mixes in; what it merges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests import tiny
from vlmix.core.adapters import AdapterSettings
from vlmix.core.errors import PlanError, RecipeError
from vlmix.core.interfaces import Source
from vlmix.models.adapters import AdaptedLinear, add_adapters
from vlmix.models.modeling import VlmixOutput
from vlmix.train.continual._base import Memory, Past, Seen, trained
from vlmix.train.continual._fisher import fisher_diagonal, own_text
from vlmix.train.continual._memory import Chosen, random_rows, reservoir
from vlmix.train.continual._tasks import mixed_weights
from vlmix.train.continual.ewc import Ewc, EwcSettings
from vlmix.train.continual.lora import Lora, LoraSettings
from vlmix.train.continual.lwf import distillation
from vlmix.train.continual.rehearsal import Rehearsal, RehearsalSettings
from vlmix.train.continual.replay_buffer import ReplayBuffer, ReplayBufferSettings
from vlmix.train.continual.soft_targets import taught_loss, uniform_loss
from vlmix.train.order import RowId
from vlmix.train.parallel.processes import Processes
from vlmix.train.trainable import select

BATCH = {"input_ids": torch.arange(4, 20).view(2, 8), "labels": torch.arange(4, 20).view(2, 8)}


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return (
        torch.randn(5, 7, dtype=torch.double),
        torch.randint(7, (5,)),
        torch.randn(5, 7, dtype=torch.double),
    )


def test_even_soft_targets_are_the_papers_and_equal_label_smoothing(scores):
    logits_NV, labels_N, _ = scores
    alpha, words = 0.1, 7
    target_NV = torch.full((5, words), alpha / (words - 1), dtype=torch.double)
    target_NV[torch.arange(5), labels_N] = 1 - alpha
    found = uniform_loss(logits_NV, labels_N, alpha)
    assert_close(found, -(target_NV * logits_NV.log_softmax(-1)).sum())
    smoothing = alpha * words / (words - 1)
    smoothed = F.cross_entropy(logits_NV, labels_N, label_smoothing=smoothing, reduction="sum")
    assert_close(found, smoothed)
    assert_close(
        uniform_loss(logits_NV, labels_N, 0.0), F.cross_entropy(logits_NV, labels_N, reduction="sum")
    )


def test_a_teachers_soft_targets_rank_the_other_words_as_it_does(scores):
    logits_NV, labels_N, theirs_NV = scores
    target_NV = theirs_NV.softmax(-1)
    rows = torch.arange(5)
    target_NV[rows, labels_N] = 0
    target_NV = 0.2 * target_NV / target_NV.sum(-1, keepdim=True)
    target_NV[rows, labels_N] = 0.8
    found = taught_loss(logits_NV, labels_N, theirs_NV, 0.2)
    assert_close(found, -(target_NV * logits_NV.log_softmax(-1)).sum())
    undecided = torch.zeros_like(theirs_NV)
    assert_close(taught_loss(logits_NV, labels_N, undecided, 0.2), uniform_loss(logits_NV, labels_N, 0.2))


def test_a_teacher_that_is_sure_of_the_label_leaves_finite_numbers(scores):
    logits_NV, labels_N, theirs_NV = scores
    sure = theirs_NV.clone()
    sure[torch.arange(5), labels_N] = 1e4
    assert taught_loss(logits_NV, labels_N, sure, 0.01).isfinite()


def test_distillation_is_t_squared_times_the_divergence(scores):
    logits_NV, _, theirs_NV = scores
    p, q = (theirs_NV / 2).softmax(-1), (logits_NV / 2).softmax(-1)
    assert_close(distillation(logits_NV, theirs_NV, 2.0), 4 * (p * (p / q).log()).sum())
    assert distillation(logits_NV, logits_NV, 2.0).abs() < 1e-12


@pytest.mark.parametrize("loss", [uniform_loss, taught_loss, distillation])
def test_gradients_are_those_of_finite_differences(loss, scores):
    logits_NV, labels_N, theirs_NV = scores

    def of(x):
        if loss is uniform_loss:
            return uniform_loss(x, labels_N, 0.1)
        return (
            taught_loss(x, labels_N, theirs_NV, 0.1)
            if loss is taught_loss
            else distillation(x, theirs_NV, 2.0)
        )

    assert torch.autograd.gradcheck(of, logits_NV.requires_grad_())


class Line(torch.nn.Module):
    """Says y = w x with noise of variance 1: its Fisher information is the mean of x^2 times (y - w x)^2."""

    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([w]))
        self.device = torch.device("cpu")

    def forward(self, x, y, labels, **_):
        return VlmixOutput(loss=((y - self.w * x) ** 2).sum() / 2, logits=torch.zeros(1, 1, 2))


def point(x, y):
    return {"x": torch.tensor([x]), "y": torch.tensor([y]), "labels": torch.zeros(1, 3, dtype=torch.long)}


def test_the_fisher_information_of_a_line_is_known():
    line = Line(2.0)
    points = [point(1.0, 3.0), point(2.0, 3.0), point(5.0, 0.0)]
    found = fisher_diagonal(line, trained(line), iter(points), 2)
    # The gradients of log p are x (y - w x): 1 and -2.
    assert_close(found, {"w": torch.tensor([(1.0 + 4.0) / 2])})


@pytest.mark.parametrize(("mode", "pull"), [("separate", (3 * 2.5 * 2, 3 * 4.0 * 1)), ("online", (0, 0))])
def test_a_quadratic_is_pulled_back_where_it_was_curved(mode, pull):
    """Two tasks, Fisher 2.5 at w = 2 and 4 at w = 3; then w = 4."""
    method = Ewc(EwcSettings(weight=3.0, mode=mode, decay=0.5, samples=2, language=None))
    line = Line(2.0)
    method.begin(line)
    assert method.penalty(Seen(line, point(1.0, 1.0), VlmixOutput(), 2)) is None
    method.end(line, iter([point(1.0, 3.0), point(2.0, 3.0)]))
    with torch.no_grad():
        line.w.fill_(3.0)
    method.end(line, iter([point(1.0, 1.0), point(2.0, 5.0)]))  # gradients -2 and -2
    with torch.no_grad():
        line.w.fill_(4.0)
    seen = Seen(line, point(1.0, 1.0), VlmixOutput(), 4)  # 2 of the step's 4 tokens
    penalty = method.penalty(seen)
    expected = pull if mode == "separate" else (3 * (0.5 * 2.5 + 4.0) * 1, 0)
    (gradient,) = torch.autograd.grad(penalty, line.w)
    assert gradient.item() == pytest.approx(sum(expected) / 2)
    again = Ewc(method.settings)
    again.load({name: tensor.clone() for name, tensor in method.state().items()}, line)
    assert_close(again.penalty(seen), penalty)


def test_the_language_comes_first_and_is_measured_on_its_own_text():
    model = tiny.model()
    texts = list(own_text(model, Processes(), samples=3, tokens=5, seed=1))
    assert [text["input_ids"].shape for text in texts] == [(1, 6)] * 3
    assert all(
        (text["input_ids"] < tiny.PLACEHOLDER).all() and text["labels"][0, 0] == -100 for text in texts
    )
    again = own_text(model, Processes(), samples=3, tokens=5, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(texts, again, strict=True))
    select(model, {"language_model.*": 1e-3, "projector.*": 1e-3})
    method = Ewc(EwcSettings.tiny())
    method.begin(model)
    held = {name for name in method.state() if name.startswith("fisher.0.")}
    assert held
    assert all(".language_model." in name for name in held)
    count = len(method.state())
    method.begin(model)
    assert len(method.state()) == count


def lora(**changes):
    return Lora(LoraSettings(**changes))


def adapted(method):
    torch.manual_seed(0)
    model = tiny.model("gpt_neox")
    method.reshape(model)
    return model, {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def test_every_linear_of_the_decoder_has_half_its_rank_stabilised():
    model, layers = adapted(lora(alpha=8.0))
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        linear = layer.get_base_layer()
        rank = min(linear.in_features, linear.out_features) // 2
        assert layer.lora_A["adapter_0"].weight.shape[0] == rank
        assert layer.scaling["adapter_0"] == pytest.approx(8 / math.sqrt(rank))
        assert ".language_model." in name
    assert not isinstance(model.get_output_embeddings(), AdaptedLinear)


def test_a_merged_model_answers_as_before_and_is_one_without_adapters():
    method = lora()
    model, layers = adapted(method)
    plain = {name: p.shape for name, p in tiny.model("gpt_neox").named_parameters()}
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["adapter_0"].weight.normal_(std=0.1)
    before = model(input_ids=BATCH["input_ids"]).logits
    method.end(model, iter(()))
    # One product of matrices in place of two: rounding.
    assert_close(model(input_ids=BATCH["input_ids"]).logits, before, atol=1e-5, rtol=1e-5)
    assert {name: p.shape for name, p in model.named_parameters()} == plain
    assert not model.config.adapters
    method.reshape(model)
    assert_close(model(input_ids=BATCH["input_ids"]).logits, before, atol=1e-5, rtol=1e-5)


def test_merging_in_16_bits_rounds_once():
    method = lora()
    model, layers = adapted(method)
    model.to(torch.bfloat16)
    expected = {}
    with torch.no_grad():
        for name, layer in layers.items():
            pairs = layer.lora_B["adapter_0"].weight, layer.lora_A["adapter_0"].weight
            pairs[0].normal_(std=0.1)
            product = layer.scaling["adapter_0"] * (pairs[0].float() @ pairs[1].float())
            expected[name] = (layer.get_base_layer().weight.float() + product).bfloat16()
    method.end(model, iter(()))
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@pytest.mark.parametrize(
    ("patterns", "trains"),
    [
        ({"projector.*": 1e-3, "language_model.*": 1e-4}, {"projector": 1e-3, "language_model": 1e-4}),
        ({"*": 1e-3, "encoders.*": 1e-4}, dict.fromkeys(("projector", "fusion", "language_model"), 0.001)
         | {"encoders": 1e-4}),
        ({"language_model.*layers.1.*": 1e-3}, {"language_model": 1e-3}),
    ],
)  # fmt: skip
def test_rates_of_the_language_model_become_its_adapters(patterns, trains):
    method = lora()
    model, _ = adapted(method)
    chosen = select(model, method.train(patterns, model))
    found = {
        name.partition(".")[0]: group.learning_rate for group in chosen.groups for name in group.parameters
    }
    assert found == trains
    words = [name for name in chosen.parameters if name.startswith("language_model.")]
    assert words
    assert all(".lora_" in name for name in words)
    if "layers.1" in next(iter(patterns)):
        assert all("layers.1" in name for name in words)


def test_adapters_where_there_are_some_or_nothing_to_train_are_refused():
    method = lora()
    model, _ = adapted(method)
    with pytest.raises(RecipeError, match="reaches none of its Linears"):
        method.train({"projector.*": 1e-3, "language_model.*embed*": 1e-3}, model)
    other = tiny.model()
    add_adapters(other, [AdapterSettings(match=["encoders.*"])])
    with pytest.raises(PlanError, match="adapters` of its own"):
        method.reshape(other)


class Numbers(Source):
    """Rows that are their own numbers."""

    def __init__(self, size):
        super().__init__(None)
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index

    @classmethod
    def tiny(cls, folder):
        return None


def past(*sizes):
    def drawn(size):
        return lambda: iter([RowId(0, row) for row in range(size)])

    return [Past(f"t{i}", [Numbers(size)], drawn(size)) for i, size in enumerate(sizes)]


def test_rehearsal_draws_a_share_of_each_earlier_task_once_for_the_whole_run():
    method = Rehearsal(RehearsalSettings(share=0.1))
    assert method.extra([], 0) == []
    first = method.extra(past(200), 0)
    both = method.extra(past(200, 30), 0)
    assert [len(memory.source) for memory in both] == [20, 3]
    rows = [memory.source.rows for memory in both]
    assert rows[0] == first[0].source.rows
    assert rows[0] != method.extra(past(200), 1)[0].source.rows
    assert len(set(rows[0])) == 20
    assert list(both[1].source) == [row for _, row in rows[1]]
    assert random_rows([1], 0.01, (0,)) == [(0, 0)]
    spread = random_rows([3, 0, 4], 1.0, (0,))
    assert spread == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert Chosen([Numbers(9), Numbers(9)], [(1, 4)]).line(0) == 5


def test_a_reservoir_holds_every_row_equally_often():
    method = ReplayBuffer(ReplayBufferSettings(size=5, ratio=0.25))
    (memory,) = method.extra(past(10, 20), 3)
    assert memory.share == 0.25
    assert len(set(memory.source.rows)) == 5
    assert len(method.extra(past(2, 2), 3)[0].source) == 4
    counts = torch.zeros(30)
    for seed in range(600):
        for task, _, row in reservoir([(0, 0, r) for r in range(30)], 5, (seed,)):
            counts[row] += task + 1
    # Binomial with 600 draws at 1/6: mean 100, deviation 9; 30 rows stay within four of them.
    assert (counts - 100).abs().max() < 37


def test_memories_have_their_share_of_the_draws():
    once, quarter = Memory("a", Numbers(10)), Memory("b", Numbers(10), 0.25)
    assert mixed_weights([None, None], [60, 30], [once]) == [None, None, None]
    assert mixed_weights([1.0, 2.0], [60, 30], [once]) == [1.0, 2.0, pytest.approx(1 / 3)]
    assert mixed_weights([None], [30], [quarter]) == [None, pytest.approx(10)]
