"""How deep a parameter lies in its part, found from how the part is put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from vlmix.core.errors import RecipeError


def rate_factors(
    model: nn.Module, decay: float | Mapping[str, float], names: Mapping[str, nn.Parameter]
) -> dict[int, float]:
    """What layer-wise decay multiplies the learning rates of parameters by, by ``id``; 1 where absent.

    ``decay`` is one number, or one for each glob over ``names``, of which the last that matches counts.
    As in BEiT (Bao et al., arXiv:2106.08254) the factor is decay ** depth.

    Raises:
        RecipeError: if a glob matches nothing that has a depth.

    """
    depths = part_depths(model)
    if not isinstance(decay, Mapping):
        return {key: decay**depth for key, depth in depths.items()}
    result: dict[int, float] = {}
    for pattern, base in decay.items():
        found = [id(p) for name, p in names.items() if fnmatchcase(name, pattern) and id(p) in depths]
        if not found:
            raise RecipeError(
                f"layer_decay: {pattern!r} matches no parameter of an encoder or of the language model"
            )
        result |= {key: base ** depths[key] for key in found}
    return result


def part_depths(model: nn.Module) -> dict[int, int]:
    """Depth by ``id`` of every parameter of the encoders and of the language model of ``model``."""
    children = dict(dict(model.named_children()).get("model", model).named_children())
    parts = [*children.get("encoders", nn.ModuleList()).children()]
    parts += [children[name] for name in ("language_model",) if name in children]
    result: dict[int, int] = {}
    for part in parts:
        for key, depth in depths(part).items():
            result.setdefault(key, depth)
    return result


def depths(part: nn.Module) -> dict[int, int]:
    """Blocks from each parameter of ``part`` to its output, by ``id``.

    Whatever comes after the blocks has 0, the last block 1, the first as many as there are, and what comes
    before them one more. The blocks are the items of that outermost ModuleList or Sequential which holds most
    parameters: the layers of a transformer, the stages of a ConvNeXt or Swin. What is registered before it is
    taken to come before it; a table that is tied to the head counts as what it is, the beginning.
    """
    chains = [*_chains(part)]
    if not chains:
        return {id(parameter): 0 for parameter in part.parameters()}
    chain = max(chains, key=lambda found: sum(p.numel() for p in found.parameters()))
    count = len(chain)
    inside = {
        id(parameter): count - index
        for index, block in enumerate(chain.children())
        for parameter in block.parameters()
    }
    result: dict[int, int] = {}
    depth = count + 1
    for _, parameter in part.named_parameters():
        if id(parameter) in inside:
            depth = 0
        result[id(parameter)] = inside.get(id(parameter), depth)
    return result


def _chains(module: nn.Module) -> Iterator[nn.ModuleList | nn.Sequential]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield child
        else:
            yield from _chains(child)
