"""Which tensors expert parallelism divides: the plan that transformers' ``DistributedConfig`` applies."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from vlmix.moe.experts import StackedExperts


def plan_experts(decoder: PreTrainedModel) -> None:
    """Add every module of stacked experts to the plan of ``decoder``; the models around it take it over.

    Each process keeps its share of a layer's experts, and tokens travel to where theirs are. Experts outside
    the decoder stay whole: a process whose rows have no picture never runs them, and others would wait.
    """
    rules: dict[str, str] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, StackedExperts):
            general = re.sub(r"\.\d+(?=\.)", ".*", name)
            rules |= {f"{general}.{weight}": "grouped_gemm" for weight, _ in module.named_parameters()}
            rules[general] = "ep_dispatch_experts"
    decoder._ep_plan = {**(decoder._ep_plan or {}), **rules}
