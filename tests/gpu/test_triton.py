"""The Triton backend around its kernels: reasons, choice, costs, what makes it compile again."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import GRIDS
from lora_ext.backends import choose
from lora_ext.backends import triton as backend

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends.triton import cards, costs, launches, regimes, tiling, tuning
from lora_ext.backends.triton.backward_launches import Backward
from lora_ext.backends.triton.costs import Problem
from lora_ext.backends.triton.forward_launches import Forward
from lora_ext.backends.triton.regimes import REGIMES
from lora_ext.call import Call, LowRank, Weight
from tests.gpu.codegen import specialisation
from tests.gpu.meta_calls import H100, backward_of, choice_of, forward_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_package_imports_without_importing_triton():
    code = "import sys, lora_ext; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_without_triton_the_package_works_and_the_reason_names_the_remedy():
    code = """
import importlib.util as u, sys
real = u.find_spec
u.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch, lora_ext
from lora_ext.backends import triton
print(triton.why_not_here(torch.device("cuda", 0)))
lora_ext.lora_linear(*(torch.ones(s) for s in ((2, 3), (4, 3), (4,), (3, 1), (1, 4))), 1.0)
assert "triton" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ("the package triton is not there; install it: pip install triton")


def call_of(one: torch.Tensor) -> Call:
    """Return a call whose operands are all (1, 1)."""
    return Call(one, Weight(one), None, LowRank(one, one, 1.0))


def reason_with(monkeypatch, capability=(8, 0), compiler="/usr/bin/gcc") -> str | None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(backend.shutil, "which", lambda name: compiler)
    backend._why_not_here.cache_clear()
    reason = backend.why_not_here(torch.device("cuda", 0))
    backend._why_not_here.cache_clear()
    return reason


def test_reasons_are_words(monkeypatch):
    assert reason_with(monkeypatch) is None
    assert reason_with(monkeypatch, (7, 5)) == "needs compute capability 8.0, Some GPU has 7.5"
    assert "C compiler" in reason_with(monkeypatch, compiler=None)
    assert backend.unsupported(call_of(torch.ones(1, 1))) == "runs on cuda tensors, x is on cpu"


def test_reason_on_an_amd_card_other_than_gfx942(monkeypatch):
    arch = SimpleNamespace(gcnArchName="gfx1100:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: arch)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    backend._why_not_here.cache_clear()
    reason = backend.why_not_here(torch.device("cuda", 0))
    backend._why_not_here.cache_clear()
    assert reason == "takes gfx942 of the AMD GPUs, this one is gfx1100"


def test_what_the_kernels_do_not_take_goes_to_the_reference(monkeypatch):
    """As on a GPU: the interpreter's switch makes the backend take CPU tensors."""
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    x = torch.ones(1, 1)
    call = call_of(x)
    assert backend.unsupported(call) is None and choose("triton", call) == "triton"
    reason = backend.unsupported(call_of(x.double()))
    assert reason == "takes float16, bfloat16 and float32, x is torch.float64"
    with pytest.raises(ValueError, match="backend 'triton' can't run.*float64"):
        choose("triton", call_of(x.double()))
    low, sparse = call.low, x.to_sparse()
    for name, refused in {
        "weight is Tensor, torch.sparse_coo": call._replace(weight=Weight(sparse)),
        "bias is Tensor, torch.sparse_coo": call._replace(bias=torch.ones(1).to_sparse()),
        "B is Tensor, torch.sparse_coo": call._replace(low=low._replace(B=sparse)),
        "keep is Tensor, torch.sparse_coo": call._replace(low=low._replace(keep=sparse)),
        "needs a weight": call._replace(weight=None),
        "not one in format 'panels'": call._replace(weight=Weight(x, "panels")),
    }.items():
        assert name in (backend.unsupported(refused) or "")


def test_tf32_only_where_torch_says_so():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed, kind in ((True, "tf32"), (False, "fp32")):
            matmul.allow_tf32 = allowed
            assert tuning.kind_of(torch.float32) == kind
            assert tuning.kind_of(torch.bfloat16) == tuning.kind_of(torch.float16) == "half"
    finally:
        matmul.allow_tf32 = before
    for kind, precision in (("fp32", "ieee"), ("tf32", "tf32")):
        assert H100.product_options(kind, torch.float32)["PRECISION"] == precision


@pytest.mark.parametrize("family", cards.FAMILIES)
@pytest.mark.parametrize("shape", GRIDS["cuda"]["standard"], ids=str)
def test_the_choice_never_moves_more_bytes_than_the_plain_layer(family, shape):
    card = next(c for c in cards.KNOWN.values() if c.family == family)
    for kind, size in (("half", 2), ("tf32", 4), ("fp32", 4)):
        p = Problem(*shape, kind, size, size)
        for direction, names in REGIMES.items():
            best = regimes.candidates(direction, p, card)[0]
            ours = names[best.name].cost(p, best.tile, card)
            plain = names["plain"].cost(p, best.tile, card)
            assert costs.bytes_of(ours) <= costs.bytes_of(plain)
            assert len(ours) < len(plain)


@pytest.mark.parametrize("shape", [(2, 16, 16, 512), (1, 1, 1, 300), (4, 32, 8, 400)], ids=str)
def test_torchs_own_ways_are_candidates_everywhere_and_right(shape):
    p = Problem(*shape)
    for direction in REGIMES:
        assert {"addmm", "plain"} <= {c.name for c in regimes.candidates(direction, p, H100)}
    M, K, N, R = shape
    x, weight, A, B = (torch.randn(n).double() for n in ((M, K), (N, K), (K, R), (R, N)))
    call = Forward(x, weight, None, A, B, 0.5, None)
    for name in ("addmm", "plain"):
        y, h = tuning.planned("forward", name, call, p, tiling.delta_tile(H100), H100)(call)
        torch.testing.assert_close(y, x @ weight.T + 0.5 * (x @ A @ B))
        for needs in ((True, False, True), (False, True, False)):
            back = Backward(y, x, weight, A, B, h, 0.5, needs, None)
            q = replace(p, needs=needs)
            run = tuning.planned("backward", name, back, q, tiling.delta_tile(H100), H100)
            dx, dA, dB = run(back)
            assert [g is not None for g in (dx, dA, dB)] == list(needs)
            if needs[0]:
                torch.testing.assert_close(dx, y @ weight + 0.5 * (y @ B.T @ A.T))
                torch.testing.assert_close(dB, 0.5 * (x @ A).T @ y)
            else:
                torch.testing.assert_close(dA, 0.5 * x.T @ (y @ B.T))


def test_every_regime_has_its_launches():
    for direction, module in (
        ("forward", tuning.forward_launches),
        ("backward", tuning.backward_launches),
    ):
        assert all(callable(getattr(module, name)) for name in REGIMES[direction])


def test_cost_of_a_known_case():
    """H100, 8192 x 4096 x 4096, R=16: 275 GFLOP in 397 us at 0.7 of the peak."""
    p = Problem(8192, 4096, 4096, 16)
    linear, *rest = REGIMES["forward"]["plain"].cost(p, tiling.delta_tile(H100), H100)
    assert linear.flops == 2 * 8192 * 4096 * 4096
    assert linear.bytes == 2 * (2 * 8192 * 4096 + 4096 * 4096 + 4096)
    assert linear.time_us(H100, "half") == pytest.approx(397 + 3, rel=0.01)
    # y is moved six times more: h @ B writes it, alpha * d reads and writes, y + d twice and once
    assert sum(k.bytes for k in rest) == pytest.approx(
        6 * 2 * 8192 * 4096 + 2 * 8192 * 4096, rel=0.02
    )


def specialisations(monkeypatch, M, K, N, scale=0.5, R=16) -> list:
    """Return what Triton compiles for at these sizes, over all regimes."""
    found = []

    def record(kernel, grid, arguments):
        found.append((kernel.__name__, specialisation("sm_90", kernel, arguments)))

    monkeypatch.setattr(launches, "launch", record)
    for name, regime in REGIMES["forward"].items():
        call = forward_of(16 if name == "decode" else M, K, N, R, scale)
        p = tuning.forward_problem(call)
        if name not in ("addmm", "plain") and (tiles := regime.tiles(p, H100)):
            tuning.planned("forward", name, call, p, tiles[0], H100)(call)
    back = backward_of(M, K, N, R, scale)
    p = tuning.backward_problem(back)
    for name, regime in REGIMES["backward"].items():
        if name not in ("addmm", "plain") and (tiles := regime.tiles(p, H100)):
            tuning.planned("backward", name, back, p, tiles[0], H100)(back)
    return found


def test_a_new_size_or_scale_does_not_recompile(monkeypatch):
    """Only Triton's own classes of an integer (one, a multiple of 16, another) compile again."""
    first = specialisations(monkeypatch, 8192, 4096, 4096)
    assert len(first) == 14
    for M in (8191, 8193, 7700, 100_000):
        assert specialisations(monkeypatch, M, 4096, 4096) == first
    assert specialisations(monkeypatch, 8192, 4112, 11008) == first
    assert specialisations(monkeypatch, 8192, 4096, 4096, scale=1.0) == first
    assert specialisations(monkeypatch, 8192, 4097, 4096) != first
    assert specialisations(monkeypatch, 8192, 4096, 4096, R=32) != first


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ("dx", [{"WANT_T": 1, "WANT_DB": 0}, {"WANT_DX": 1, "WANT_DA": 0, "WANT_DB": 0}]),
        ("dA", [{"WANT_T": 1, "WANT_DB": 0}, {"WANT_DX": 0, "WANT_DA": 1, "WANT_DB": 0}]),
        ("dB", [{"WANT_T": 0, "WANT_DB": 1}, {"WANT_DX": 0, "WANT_DA": 0, "WANT_DB": 1}]),
        ("dweight", []),
    ],
)
def test_backward_launches_only_what_needs_asks_for(monkeypatch, needs, expected):
    launched = []
    monkeypatch.setattr(launches, "launch", lambda k, grid, args: launched.append(args))
    asked = tuple(needs == name for name in ("dx", "dA", "dB"))
    call = backward_of(8192, 4096, 4096, needs=asked)
    p = tuning.backward_problem(call)
    tile = REGIMES["backward"]["two_launches"].tiles(p, H100)[0]
    gradients = tuning.planned("backward", "two_launches", call, p, tile, H100)(call)
    assert [g is not None for g in gradients] == list(asked)
    assert [
        {k: int(args[k]) for k in args if k.startswith("WANT_")} for args in launched
    ] == expected


def test_scale_is_split_exactly_for_float16_alone():
    for scale in (0.0, 1.0, -2.5, 1e5, 1e-6):
        factor, power = launches.split_scale(scale, torch.float16)
        assert factor * power == scale and (0.5 <= abs(factor) < 1 or scale == 0)
        assert launches.split_scale(scale, torch.bfloat16) == (scale, 1.0)


def test_bits_come_in_words_where_a_row_is_whole_words():
    keep = torch.zeros(3, 12, dtype=torch.uint8)
    words = tuning.words_of(keep, 96)
    assert words.dtype == torch.int32 and words.shape == (3, 3)
    assert launches.bits_of(words).shape == (3, 12)
    assert tuning.words_of(keep, 95) is keep
    unaligned = torch.zeros(37, dtype=torch.uint8)[1:].view(3, 12)
    assert tuning.words_of(unaligned, 96) is unaligned


def test_descriptors_only_where_strides_and_alignment_allow():
    matrix = torch.empty(64, 128, dtype=torch.bfloat16)
    assert tuning.describable(matrix)
    assert not tuning.describable(matrix.T)
    assert not tuning.describable(matrix[:, 1:])  # 2 bytes off
    assert not tuning.describable(torch.empty(64, 127, dtype=torch.bfloat16))
    assert not tuning.describable(torch.empty(1, 128).expand(64, 128))  # stride 0
    f = forward_of(64, 128, 256)
    assert tuning.forward_problem(f).descriptors
    turned = f._replace(weight=f.weight.T.contiguous().T)
    assert tuning.forward_problem(turned).descriptors
    assert not tuning.forward_problem(f._replace(x=f.x.T.contiguous().T)).descriptors


def test_a_regime_forced_by_name_is_taken_where_it_can_run():
    with backend.regime(forward="torch_base"):
        assert choice_of(forward_of(8192, 4096, 4096))[0] == "torch_base"
    with backend.regime(forward="in_loop", descriptors=False):
        name, tile = choice_of(forward_of(8192, 4096, 4096))
        assert name == "in_loop" and not tile.descriptors
        assert choice_of(forward_of(8192, 4096, 4096, R=100))[0] != "in_loop"


def test_family_of_an_unlisted_capability_asks_no_more_than_it_has():
    assert cards.family_of(9, 0) == "sm_90" and cards.family_of(8, 7) == "sm_80"
    assert cards.family_of(10, 3) == "sm_100" and cards.family_of(13, 0) == "sm_86"


def test_an_unknown_regime_is_named():
    with pytest.raises(ValueError, match="backward must be one of two_launches, .*, plain, got"):
        with backend.regime(backward="in_loop"):
            pass
