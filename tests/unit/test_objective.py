"""Objectives: what Python would compute, for nothing but figures and cost; no text of a grid is ever run."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vlmix.core.errors import RecipeError
from vlmix.search.objective import COSTS, check_sources, read_objective

KNOWN = {"synth_qa.accuracy": 0.7, "synth_qa.tasks.colour": 0.5, "mme.total": 1500.0, "cost.flops": 2e9}
SAFE = {"min": min, "max": max, "log": math.log, "mean": lambda *values: math.fsum(values) / len(values)}


class Names:
    """``synth_qa.accuracy`` as Python looks it up."""

    def __init__(self, prefix=""):
        self.prefix = prefix

    def __getattr__(self, name):
        full = f"{self.prefix}.{name}"
        return KNOWN[full] if full in KNOWN else Names(full)


names = st.sampled_from(sorted(KNOWN))
numbers = st.floats(-50, 50, allow_nan=False).map(lambda x: f"{round(x, 3)!r}") | st.integers(0, 99).map(str)


def grown(inner):
    pairs = st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(" ".join)
    calls = st.tuples(st.sampled_from(["min", "max", "mean"]), st.lists(inner, min_size=2, max_size=4))
    return (
        pairs.map("({})".format)
        | pairs
        | calls.map(lambda call: f"{call[0]}({', '.join(call[1])})")
        | inner.map("log({})".format)
        | inner.map("-({})".format)
    )


formulas = st.recursive(names | numbers, grown, max_leaves=12)


@given(formulas)
def test_it_is_what_python_computes(text):
    space = {"__builtins__": {}, **SAFE, **{name.split(".")[0]: Names(name.split(".")[0]) for name in KNOWN}}
    try:
        expected = eval(text, space)
    except (ArithmeticError, ValueError):
        expected = math.nan
    try:
        objective = read_objective(text)
    except RecipeError as error:
        assert "names no score" in str(error)  # noqa: PT017  (only some formulas have none)
        assert not any(name in text for name in KNOWN)
        return
    assert objective.names == {name for name in KNOWN if name in text}
    if math.isfinite(expected):
        assert objective.value(KNOWN) == pytest.approx(expected, rel=1e-12)
    else:
        with pytest.raises(RecipeError, match=r"has no value|not a finite number"):
            objective.value(KNOWN)


@given(st.text(max_size=60))
def test_no_text_does_anything_but_compute(text):
    try:
        objective = read_objective(text)
    except RecipeError:
        return
    assume(objective.names)
    with pytest.raises(RecipeError, match="nothing is called"):
        objective.value({"synth_qa.accuracy": 1.0} if "synth_qa.accuracy" not in objective.names else {})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "synth_qa.accuracy.__class__()", "(lambda: 1)()", "open('x')",
        "synth_qa['accuracy']", "[a for a in b]", "a if b else c", "a ** 9", "a // 2", "a % 2", "a < b",
        "a and b", "not a", "~a", "'a'", "b'a'", "True + a", "None", "1j * a", "...", "f'{a}'", "{a}",
        "(a, b)", "a := 1", "min(*a)", "min(a, key=b)", "min(a)", "log(a, 2)", "mean()", "sum(a, b)",
        "a.b(c)", "min.a(b)", "1 + 2", "", "a +", "a\nb", "import os", "1e999 * a", "9" * 400 + " * a",
        "(" * 3000, "a+" * 999 + "a",
        "-" * 1900 + "a",
    ],
)  # fmt: skip
def test_everything_else_is_refused(text):
    with pytest.raises(RecipeError, match="objective"):
        read_objective(text).value({"a": 1.0, "b": 2.0, "c": 3.0})


def test_a_wrong_name_is_told_with_the_nearest():
    objective = read_objective("synth_qa.acuracy - cost.flops / 1e9")
    with pytest.raises(RecipeError, match=r"'synth_qa.acuracy'. Did you mean 'synth_qa.accuracy'\?"):
        objective.value(KNOWN)
    check_sources(objective, ["synth_qa"])
    with pytest.raises(RecipeError, match=r"no cost 'cost.flop'. Did you mean 'cost.flops'"):
        check_sources(read_objective("synth_qa.accuracy - cost.flop"), ["synth_qa"])
    with pytest.raises(RecipeError, match=r"'synthqa.accuracy' is no figure .*Did you mean 'synth_qa'"):
        check_sources(read_objective("synthqa.accuracy"), ["synth_qa", "mme"])
    for name in COSTS:
        check_sources(read_objective(f"1 / cost.{name}"), [])
