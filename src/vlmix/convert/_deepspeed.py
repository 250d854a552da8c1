"""DeepSpeed's expert layers in MoE-LLaVA's folders: what ``moe`` in a config says, and names of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vlmix.convert._llava_parts import check_settled
from vlmix.convert._names import Names, Rename, Rule, Stack
from vlmix.core.errors import CheckpointError
from vlmix.core.experts import ExpertSettings
from vlmix.moe.balance import deepspeed_coefficient, from_deepspeed
from vlmix.moe.install import chosen_layers
from vlmix.moe.routers.deepspeed095 import Deepspeed095Settings

# Their words for places, and ours.
_PRESETS = {"sparse": "interval", "first_half": "first_half", "second_half": "second_half", "dense": "all"}
_GATE = ("capacity_factor", "eval_capacity_factor", "min_capacity")
_NEEDED = ("moe_layers_idx", "num_experts", "top_k_experts", "use_residual", "router_aux_loss_coef", *_GATE)
# DeepSpeed 0.9.5 has no choice about these.
_GATES = {"second": "sampled", "drop_tokens": True, "random_tokens": True, "noisy_gate_policy": None}
_BALANCE = {"choices": "first", "padding": "counted", "z": 0.0, "per_modality": False, "bias_rate": 0.0}
# Ways to count what its coefficient weighs: an even load costs the same in all of them.
_COUNTED: Final = ("choices", "padding")
_MIXTURE = {
    "place": "language_model",
    "kind": "ffn",
    "scope": "token",
    "width": None,
    "shared": 0,
}
_OURS = "model.language_model.model.layers.{n}.mlp."


@dataclass(frozen=True)
class Network:
    """Names of a feed-forward network's Linears: those that read the input, a gate first, and the last.

    ``ours`` are transformers' names in the same order, where they differ.
    """

    first: tuple[str, ...] = ("gate_proj", "up_proj")
    last: str = "down_proj"
    bias: bool = False
    ours: tuple[str, ...] = ()


def read_mixture(moe: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture that ``moe`` describes; every value is the checkpoint's, since their defaults differ.

    Raises:
        CheckpointError: if a value is missing.

    """
    missing = [key for key in _NEEDED if moe.get(key) is None]
    if missing:
        raise CheckpointError(
            f"config.json: `moe` has no {', '.join(missing)}, without which it says too little"
        )
    layers, experts = list(moe["moe_layers_idx"]), list(moe["num_experts"])
    switch = from_deepspeed(float(moe["router_aux_loss_coef"]), len(layers))
    return {
        "layers": layers,
        "count": experts[0] if len({*experts}) == 1 else experts,
        "router": {"kind": "deepspeed095", "k": moe["top_k_experts"], **{key: moe[key] for key in _GATE}},
        "residual": moe["use_residual"],
        "balance": {"switch": switch, **_BALANCE},
    }


def written_mixture(mixture: ExpertSettings, layers: int) -> dict[str, Any]:
    """``moe`` for a mixture in a decoder of so many layers.

    Of the balance it has the coefficient alone, in DeepSpeed's unit; whose choices count, and whether padding
    does, its code has decided.

    Raises:
        CheckpointError: if DeepSpeed 0.9.5 cannot do what the mixture does.

    """
    found = mixture.model_dump(mode="json")
    if found["router"].get("kind") != "deepspeed095":
        raise CheckpointError(
            f"MoE-LLaVA's code knows DeepSpeed's gates alone; this model's router is {found['router']}"
        )
    router = Deepspeed095Settings(**mixture.router).model_dump(mode="json")
    parts = {
        "experts": (found, _MIXTURE),
        "router": (router, _GATES),
        "balance": (found["balance"], {k: v for k, v in _BALANCE.items() if k not in _COUNTED}),
    }
    check_settled(parts, "MoE-LLaVA")
    chosen = chosen_layers(mixture, layers)
    counts = [mixture.count] * len(chosen) if isinstance(mixture.count, int) else list(mixture.count)
    return {
        "moe_enable": True,
        "moe_mode": _mode(chosen, layers),
        "moe_layers_idx": chosen,
        "ep_size": 1,
        "num_experts": counts * len(chosen) if len(counts) == 1 else counts,
        "top_k_experts": router["k"],
        **{key: router[key] for key in _GATE},
        "use_residual": mixture.residual,
        "router_aux_loss_coef": deepspeed_coefficient(mixture.balance.switch, len(chosen)),
        "train_modules": [],
    }


def _mode(chosen: Sequence[int], layers: int) -> str:
    presets = (
        (name, chosen_layers(ExpertSettings.model_validate({"layers": ours}), layers))
        for name, ours in _PRESETS.items()
    )
    return next((name for name, layers_of in presets if layers_of == list(chosen)), "custom")


def expert_names(layer: str, network: Network) -> Names:
    """Where a mixture's tensors go; ``layer`` is what stands before those of decoder layer ``{n}``."""
    theirs, ours = f"{layer}mlp.deepspeed_moe.", _OURS
    one = f"{theirs}experts.deepspeed_experts.{{e}}."
    up = "gate_up_proj" if len(network.first) > 1 else "up_proj"
    rules: list[Rule] = [
        Rename(f"{theirs}gate.wg.weight", f"{ours}router.gate.weight"),
        Stack(tuple(f"{one}{name}.weight" for name in network.first), f"{ours}experts.{up}"),
        Stack((f"{one}{network.last}.weight",), f"{ours}experts.down_proj"),
    ]
    if network.bias:
        rules += [
            Stack(tuple(f"{one}{name}.bias" for name in network.first), f"{ours}experts.{up}_bias"),
            Stack((f"{one}{network.last}.bias",), f"{ours}experts.down_proj_bias"),
        ]
    linears = (*network.first, network.last)
    ours_of = dict(zip(linears, network.ours or linears, strict=True))
    dense = [
        Rename(f"{layer}mlp.mlp.{name}.{{rest}}", f"{ours}dense.{ours_of[name]}.{{rest}}") for name in linears
    ]
    return Names((*rules, Rename(f"{layer}mlp.coefficient.{{rest}}", f"{ours}blend.{{rest}}"), *dense))
