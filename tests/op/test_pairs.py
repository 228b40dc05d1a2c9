"""bfloat16 by pairs and by floats: both on every CPU, whichever its table says.

The other tests run what the table says; these run the other kind over the same cases, and both
where they differ: what lies next to an odd element, each way, and panels of either kind.
"""

import pytest
import torch

from lora_ext.backends import BACKENDS, cpp
from lora_ext.testing import (
    LAYOUTS,
    MASKED,
    OF_CODES,
    SHAPES,
    TAILS,
    WITHOUT_BASE,
    Case,
    broken_rules,
    check,
    expected,
    gradients,
)
from tests.conftest import linear_of, small_call
from tests.op.groups import GROUPS, broken_in_group, cases_of
from tests.op.pairs import BF16, forced_pairs, the_other_kind

WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))

# Past one block of each kind, and a large weight, of which the next panels are asked for ahead.
LARGE = [Case((400,), 1100, 700, 24), Case((40,), 1400, 1300, 8)]
# Every second row of x and dy begins within a pair; all blocks of their columns but the last are
# read in place.
LARGE += [Case((M,), 805, 421, 24) for M in (33, 201)]
# Rows of x and of the weight a multiple of 4 KB apart meet in one set of a cache; then those of dy.
APART = [Case((M,), K, 72, 16) for M, K in ((70, 1024), (9, 2048), (40, 3072), (3, 4096))]
APART += [Case((40,), 72, 2048, 16)]
CASES = [*SHAPES, *MASKED, *WITHOUT_BASE, *LARGE, *APART]
CASES += [case.but(layout=name) for case in (TAILS, MASKED[0]) for name in LAYOUTS]
FP32_ADAPTERS = [*SHAPES, *MASKED, *WITHOUT_BASE, *OF_CODES]
CASES += [case.but(adapter_dtype=torch.float32) for case in FP32_ADAPTERS]
both_kinds = pytest.mark.parametrize("pairs", [False, True], ids=["floats", "pairs"])


@pytest.mark.parametrize("case", [case.but(dtype=BF16) for case in CASES], ids=str)
def test_the_other_kind_keeps_the_error_rule(case):
    with forced_pairs(the_other_kind()):
        check(linear_of("cpp"), case)


@pytest.mark.parametrize("name", GROUPS)
def test_the_other_kind_keeps_the_error_rule_in_a_group(name):
    with forced_pairs(the_other_kind()):
        assert broken_in_group(cases_of(name, BF16, torch.float32), "cpp") == []


@both_kinds
@pytest.mark.parametrize("M", [1, 3, 20, 70])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("K", "N"), [(91, 157), (475, 421)])  # within a block of 384, and past it
def test_what_lies_next_to_an_odd_element_is_not_read(pairs, M, dropout, K, N):
    """Infinity there, times the 0 that pads the other factor, would be NaN."""
    case = Case((M,), K, N, 5, dtype=BF16, dropout=dropout)
    want = expected(case)
    surrounded = {name: in_infinity(want.inputs[name]) for name in ("x", "weight", "A", "B", "dy")}
    with forced_pairs(pairs):
        got = gradients(linear_of("cpp"), want.inputs | surrounded, case.alpha)
    assert broken_rules(got, want) == []


def in_infinity(matrix: torch.Tensor) -> torch.Tensor:
    """Copy a matrix to where infinities lie around each row."""
    rows, cols = matrix.shape
    memory = torch.full((rows + 2, cols + 2), torch.inf, dtype=matrix.dtype)
    memory[1:-1, 1:-1] = matrix
    return memory[1:-1, 1:-1]


@both_kinds
def test_an_infinite_element_reaches_its_row_alone(pairs):
    x = torch.randn(20, 91).to(BF16)
    x[3, 90] = torch.inf
    weight, A, B = torch.randn(40, 91).to(BF16), torch.randn(91, 3), torch.randn(3, 40)
    with forced_pairs(pairs):
        y = linear_of("cpp")(x, weight, None, A, B, 0.5)
    assert (~y[3].isfinite()).all() and y[torch.arange(20) != 3].isfinite().all()


WAYS = [
    ("y", "strips"),
    ("y", "dots"),
    ("y", "library"),
    ("dx", "strips"),
    ("dx", "stream"),
    ("dx", "library"),
    ("shrink", "strips"),
    ("shrink", "stream"),
    ("shrink", "library"),
    ("expand", "library"),
    ("gradient", "strips"),
    ("gradient", "library"),
    ("dweight", "strips"),
    ("dweight", "library"),
]


@both_kinds
@pytest.mark.parametrize(("product", "way"), WAYS, ids="-".join)
def test_every_way_keeps_the_error_rule(pairs, product, way):
    from lora_ext import _C

    cases = [Case((M,), K, N, R) for M, K, N, R in ((3, 93, 70, 5), (100, 130, 300, 16))]
    cases += [case.but(layout="B_transposed") for case in cases]
    cases += [cases[1].but(dropout=0.3)]
    try:
        _C.force_way(product, way)
        if product == "expand":  # what is added to PyTorch's products
            _C.force_way("y", "library")
            _C.force_way("dx", "library")
        with forced_pairs(pairs):
            for case in cases:
                check(linear_of("cpp"), case.but(dtype=BF16))
                check(linear_of("cpp"), case.but(dtype=BF16, adapter_dtype=torch.float32))
    finally:
        for other in _C.ways():
            _C.force_way(other, None)


def test_every_way_is_in_the_list():
    from lora_ext import _C

    ways = {(product, way) for product, ways in _C.ways().items() for way in ways}
    assert ways - set(WAYS) == {("expand", "strips")}, "which the library's y and dx take"


@pytest.mark.parametrize("threads", [2, 6])
def test_more_threads_keep_the_error_rule(threads):
    """From 5 on they pack a weight together."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with forced_pairs(True):
            for case in (Case((400,), 405, 264, 8), Case((400,), 404, 264, 8, dropout=0.3)):
                check(linear_of("cpp"), case.but(dtype=BF16))
    finally:
        torch.set_num_threads(before)


def test_panels_of_pairs_take_two_bytes_an_element_and_others_four():
    weight = torch.randn(33, 49).to(BF16)  # three panels of 16, 25 pairs
    with forced_pairs(True):
        of_pairs = cpp.pack_weight(weight, transposed=True).data
    with forced_pairs(False):
        of_floats = cpp.pack_weight(weight, transposed=True).data
    assert (of_pairs.dtype, of_pairs.nbytes) == (BF16, 2 * 48 * 50)
    assert (of_floats.dtype, of_floats.nbytes) == (torch.float32, 4 * 48 * 49)
    # The pairs of the first column: neighbours in memory, columns 32 elements a row of them apart.
    first = of_pairs.view(3, 25, 16, 2)[0, :, 0].flatten()
    assert torch.equal(first[:49], weight[0]) and first[49] == 0


@both_kinds
def test_panels_of_the_other_kind_are_refused(pairs):
    x, weight, A, B = (torch.ones(*shape).to(BF16) for shape in ((2, 8), (3, 8), (8, 1), (1, 3)))
    with forced_pairs(not pairs):
        panels = cpp.pack_weight(weight, transposed=True)
    with forced_pairs(pairs), pytest.raises(RuntimeError, match="weight must be the panels"):
        torch.ops.lora_ext.linear_fwd(x, panels.data, None, A, B, 1.0, format="panels")


def test_the_table_decides_unless_a_kind_is_forced():
    """The two kinds of panels differ, so that these show which one is taken."""
    weight = torch.randn(33, 49).to(BF16)
    with forced_pairs(not the_other_kind()):
        want = cpp.pack_weight(weight, transposed=True).data
    got = cpp.pack_weight(weight, transposed=True).data
    assert torch.equal(got, want)
