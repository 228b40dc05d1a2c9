"""Problems drawn at random, each held to the error rule; the long run is `make test-long`.

A failure prints a line that reproduces it. LORA_EXT_CPU_ISA names another instruction set.

Of thousands of problems some break the rule by the plain layer's luck, where all hangs on a number
or two that happen to round well: in 400 draws of the values of one problem in float16, with one row
and rank 1, PyTorch by two routes breaks it against itself in six. A fault is there at other values
too: where the rule is broken, the errors of nine draws together have to keep it.
"""

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from lora_ext.backends import BACKENDS
from lora_ext.testing import DTYPES, LAYOUTS, Case, make_inputs
from lora_ext.testing.rule import broken_rules, errors, expect, gradients
from tests import EXAMPLES
from tests.conftest import linear_of, small_call

LARGEST = 600 if EXAMPLES >= 1000 else 90
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
sizes = st.one_of(st.integers(1, 40), st.integers(1, LARGEST))
leads = st.one_of(
    st.tuples(sizes),
    st.tuples(st.integers(0, 2)),
    st.tuples(st.integers(1, 4), st.integers(0, 30)),
    st.just(()),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a problem that `lora_linear` takes."""
    dtype, adapter_dtype = draw(st.sampled_from(DTYPES))
    lead, base = draw(leads), draw(st.sampled_from((True, True, True, False)))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    # These take a row of x or dy, and without a base there is no weight.
    if 0 in lead or not lead or (not base and layout.startswith(("weight", "bias"))):
        layout = "contiguous"
    return Case(
        lead,
        draw(sizes),
        draw(sizes),
        draw(st.one_of(st.integers(1, 17), st.integers(1, 130))),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        bias=draw(st.booleans()) or layout.startswith("bias"),
        layout=layout,
        alpha=draw(st.sampled_from((0.0, 1.0, 1.7, -2.5, 1e-5, 64.0))),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.1, 0.7))),
        base=base,
    )


def broken(linear, case: Case) -> list[str]:
    """Return a line for each result that breaks the rule, and does so over nine draws together."""
    want = expect(make_inputs(case), case.alpha)
    got = gradients(linear, want.inputs, case.alpha)
    if not (lines := broken_rules(got, want)) or any(" error " not in line for line in lines):
        return lines
    over_draws = errors(got, want)
    for seed in range(1, 9):
        want = expect(make_inputs(case, seed), case.alpha)
        more = errors(gradients(linear, want.inputs, case.alpha), want)
        over_draws = [
            a._replace(ours=a.ours + b.ours, plain=a.plain + b.plain, floor=a.floor + b.floor)
            for a, b in zip(over_draws, more, strict=True)
        ]
    event("broken at one draw")
    return [str(error) for error in over_draws if error.broken]


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "triton"])
def test_any_problem_keeps_the_error_rule(name):
    if (why := BACKENDS[name].unsupported(small_call())) is not None:
        pytest.skip(why)
    linear = linear_of(name)

    @SETTINGS
    @example(Case((300,), 600, 13, 4, alpha=0.0))
    @given(cases())
    def holds(case):
        lines = broken(linear, case)
        assert not lines, "\n".join([str(case), *lines])

    holds()
