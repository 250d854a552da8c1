"""A trained dense model becomes a mixture of experts, and says how far its answers moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vlmix.core.errors import PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.models.adapters import bare
from vlmix.models.configuration import VlmixConfig
from vlmix.models.mixtures import active_parameters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import parameter_count, pictures_of
from vlmix.moe.experts import StackedExperts
from vlmix.moe.install import DECODER, install, upcycle
from vlmix.moe.kernels import kernel_for
from vlmix.moe.layer import ExpertLayer
from vlmix.moe.structure import feed_forwards

_PROBE_TOKENS: Final = 16
# Gradients of a mean cross entropy that are rounding noise: exact copies give 1e-9 to 1e-7, one percent of
# weight noise 1e-4.
_NOTHING: Final = 1e-6


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """What was put in, and what a probe saw: the largest change of a logit, the routers' largest gradient."""

    settings: ExpertSettings
    layers: tuple[ExpertLayer, ...]
    parameters: tuple[int, int]
    active: int
    change: float
    router_gradient: float

    def __str__(self) -> str:
        """One line, and one more for each thing to know."""
        counts = sorted({layer.router_experts for layer in self.layers})
        before, after = self.parameters
        numbers = " or ".join(map(str, counts))
        lines = [
            f"experts: {len(self.layers)} layers of {self.settings.place} with {numbers} experts "
            f"({self.settings.kind}); {before / 1e6:,.1f} M parameters became {after / 1e6:,.1f} M, "
            f"{self.active / 1e6:,.1f} M active; max |change of a logit| {self.change:.1e}"
        ]
        if self.router_gradient < _NOTHING:
            lines.append(
                f"warning: the answers give these routers no gradient (at most {self.router_gradient:.0e}): "
                f"all experts agree, so only the balance loss (switch {self.settings.balance.switch:g}) or "
                "noise in the choice can tell them apart. Set `noise` or `redraw`, or choose without "
                "`renormalise`"
            )
        first = self.layers[0].experts
        if isinstance(first, StackedExperts):
            weight = first.down_proj
            kernel, reason = kernel_for(first, weight.dtype, weight.device)
            lines.append(f"experts: computed by {kernel}{f' ({reason})' if reason else ''}")
        return "\n".join(lines)


def upcycle_model(model: PreTrainedModel, settings: ExpertSettings) -> UpcycleReport:
    """Put the mixture into ``model``, whose weights become the experts', and note it in its configuration.

    Raises:
        PlanError: if there is nothing to replace, the router cannot work there, or adapters are in the way.

    """
    whole = cast("VlmixForConditionalGeneration", model)
    _check_adapters(whole, settings)
    training, count = whole.training, parameter_count(whole)
    whole.eval()
    inputs = _probe_inputs(whole, settings)
    with torch.no_grad():
        before = whole(**inputs).logits
    layers = upcycle(whole.model, settings, whole.config, causal=settings.place == DECODER)
    after = whole(**inputs).logits
    report = UpcycleReport(
        settings=settings,
        layers=tuple(layers),
        parameters=(count, parameter_count(whole)),
        active=active_parameters(whole),
        change=float((after.detach() - before).abs().max()),
        router_gradient=_router_gradient(after, layers),
    )
    whole.train(training)
    _note(whole, settings)
    return report


def reshape_model(model: PreTrainedModel, settings: ExpertSettings) -> None:
    """Put the mixture into ``model`` without weights, as for a checkpoint or for shapes.

    Raises:
        PlanError: as ``upcycle_model``.

    """
    whole = cast("VlmixForConditionalGeneration", model)
    _check_adapters(whole, settings)
    install(whole.model, settings, whole.config, causal=settings.place == DECODER)
    _note(whole, settings)


def _check_adapters(model: VlmixForConditionalGeneration, settings: ExpertSettings) -> None:
    """Networks with adapters inside would not be found, and those behind them miscounted."""
    if not model.config.adapters:
        return
    seen = feed_forwards(model.model).keys()
    with bare(model):
        hidden = sorted(feed_forwards(model.model).keys() - seen)
    blocked = [name for name in hidden if name.startswith(settings.place)]
    if blocked:
        raise PlanError(
            f"experts: adapters are in {blocked[0]} and {len(blocked) - 1} more feed-forward networks of "
            f"{settings.place}. Let `model.adapters` match what experts leave alone, such as "
            f"{settings.place}.*self_attn*, or merge them before the experts, with --merge-adapters"
        )


def _note(model: VlmixForConditionalGeneration, settings: ExpertSettings) -> None:
    config: VlmixConfig = model.config
    config.experts = [*(config.experts or []), settings.model_dump(mode="json")]


def _probe_inputs(model: VlmixForConditionalGeneration, settings: ExpertSettings) -> dict[str, Tensor]:
    """A row of random text; behind a picture of noise where the mixture is in what sees pictures."""
    config, device = model.config, model.device
    rows = config.language.vocab_size
    ids_1T = torch.randint(rows, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    ids_1T = ids_1T.masked_fill(ids_1T == config.image_token_id, 0)
    text = {"input_ids": ids_1T, "instruction_ids": ids_1T}
    if settings.place == DECODER:
        return text
    noise = torch.Generator().manual_seed(1)
    pictures = {
        name: torch.rand(shape.shape, generator=noise).to(device) if shape.is_floating_point() else shape
        for name, shape in pictures_of(config, 1).items()
    }
    shown_1N = torch.full((1, config.image_seq_length), config.image_token_id, device=device)
    return {**text, "input_ids": torch.cat((shown_1N, ids_1T), 1), **pictures}


def _router_gradient(logits_1TV: Tensor, layers: list[ExpertLayer]) -> float:
    routers = [p for layer in layers for p in layer.router.parameters() if p.requires_grad]
    target_T = logits_1TV[0].detach().argmin(-1)
    loss = F.cross_entropy(logits_1TV[0].float(), target_T)
    found = torch.autograd.grad(loss, routers, allow_unused=True) if loss.requires_grad else []
    return max((float(g.abs().max()) for g in found if g is not None), default=0.0)
