"""The Triton backend around its kernels: reasons, choice, costs, what makes it compile anew."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.grids import GRIDS
from lora_ext.backends import choose
from lora_ext.backends import triton as backend

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs the compiler, not the interpreter", allow_module_level=True)

from lora_ext.backends.triton_kernels import (
    cards,
    choice,
    cost_model,
    gradients,
    launch,
    regimes,
    tuning,
)
from lora_ext.backends.triton_kernels.cost_model import Problem
from tests.gpu.codegen import specialisation

H100 = cards.KNOWN["H100"]
ROOT = Path(__file__).parents[2]


def test_the_package_imports_without_importing_triton():
    code = "import sys, lora_ext; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT).returncode == 0


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


def reason_with(monkeypatch, capability=(8, 0), compiler="/usr/bin/gcc") -> str | None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(backend.shutil, "which", lambda name: compiler)
    backend.why_not_here.cache_clear()
    reason = backend.why_not_here(torch.device("cuda", 0))
    backend.why_not_here.cache_clear()
    return reason


def test_reasons_are_words(monkeypatch):
    assert reason_with(monkeypatch) is None
    assert reason_with(monkeypatch, (7, 5)) == "needs compute capability 8.0, Some GPU has 7.5"
    assert "C compiler" in reason_with(monkeypatch, compiler=None)
    x = torch.ones(1, 1)
    assert backend.unsupported(x, x, x) == "runs on cuda tensors, x is on cpu"


def test_reason_on_an_amd_card_other_than_gfx942(monkeypatch):
    arch = SimpleNamespace(gcnArchName="gfx1100:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: arch)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    backend.why_not_here.cache_clear()
    reason = backend.why_not_here(torch.device("cuda", 0))
    backend.why_not_here.cache_clear()
    assert reason == "takes gfx942 of the AMD GPUs, this one is gfx1100"


def test_what_the_kernels_do_not_take_goes_to_the_reference(monkeypatch):
    """As on a GPU: the interpreter's switch makes the backend take CPU tensors."""
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    x = torch.ones(1, 1)
    assert backend.unsupported(x, x, x) is None and choose(None, x, x, x) == "triton"
    d = x.double()
    reason = backend.unsupported(d, d, d)
    assert reason == "takes float16, bfloat16 and float32, x is torch.float64"
    assert choose(None, d, d, d) != "triton"
    with pytest.raises(ValueError, match="backend 'triton' can't run.*float64"):
        choose("triton", d, d, d)
    sparse = x.to_sparse()
    assert "weight is Tensor, torch.sparse_coo" in backend.unsupported(x, sparse, x)


def test_tf32_only_where_torch_says_so():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed, kind in ((True, "tf32"), (False, "fp32")):
            matmul.allow_tf32 = allowed
            assert launch.kind_of(torch.float32) == kind
            assert launch.kind_of(torch.bfloat16) == launch.kind_of(torch.float16) == "half"
    finally:
        matmul.allow_tf32 = before
    A = torch.empty(1, 1)
    for kind, precision in (("fp32", "ieee"), ("tf32", "tf32")):
        assert launch.product_options(kind, A, H100)["PRECISION"] == precision


@pytest.mark.parametrize("family", cards.FAMILIES)
@pytest.mark.parametrize("shape", GRIDS["cuda"]["standard"], ids=str)
def test_the_choice_never_moves_more_bytes_than_the_plain_layer(family, shape):
    card = next(c for c in cards.KNOWN.values() if c.family == family)
    for kind, size in (("half", 2), ("tf32", 4), ("fp32", 4)):
        p = Problem(*shape, kind, size, size)
        best = choice.forward_candidates(p, card, True)[0]
        splits = choice.decode_splits(p, best.tile, card) if best.name == "decode" else 1
        ours = cost_model.forward(best.name, p, best.tile, card, splits)
        plain = cost_model.plain_forward(p)
        assert cost_model.bytes_of(ours) <= cost_model.bytes_of(plain)
        assert len(ours) < len(plain)
        best = choice.backward_candidates(p, card, True)[0]
        ours = cost_model.backward(best.name, p, best.tile, card)
        assert cost_model.bytes_of(ours) <= cost_model.bytes_of(cost_model.plain_backward(p))


@pytest.mark.parametrize("shape", [(2, 16, 16, 512), (1, 1, 1, 300), (4, 32, 8, 400)], ids=str)
def test_plain_runs_where_every_regime_would_move_more(shape):
    p = Problem(*shape)
    assert [c.name for c in choice.forward_candidates(p, H100, True)] == ["plain"]
    (way,) = choice.backward_candidates(p, H100, True)
    assert way.name == "plain"
    M, K, N, R = shape
    x, weight, A, B = (torch.randn(n).double() for n in ((M, K), (N, K), (K, R), (R, N)))
    y, h = regimes.plain(regimes.Forward(x, weight, None, A, B, 0.5, H100), way.tile)
    torch.testing.assert_close(y, x @ weight.T + 0.5 * (x @ A @ B))
    needs = (True, False, False, False, True)
    dx, dA, dB = gradients.plain(
        gradients.Backward(y, x, weight, A, B, h, 0.5, needs, H100), way.tile
    )
    torch.testing.assert_close(dx, y @ weight + 0.5 * (y @ B.T @ A.T))
    torch.testing.assert_close(dB, 0.5 * (x @ A).T @ y)
    assert dA is None


def test_h_first_is_chosen_by_name_only():
    for card in cards.KNOWN.values():
        for shape in GRIDS["cuda"]["standard"]:
            names = [c.name for c in choice.forward_candidates(Problem(*shape), card, True)]
            assert names and "h_first" not in names


def test_cost_of_a_known_case():
    """H100, 8192 x 4096 x 4096, R=16: 275 GFLOP in 397 us at 0.7 of the peak."""
    linear, *rest = cost_model.plain_forward(Problem(8192, 4096, 4096, 16))
    assert linear.flops == 2 * 8192 * 4096 * 4096
    assert linear.bytes == 2 * (2 * 8192 * 4096 + 4096 * 4096 + 4096)
    assert linear.time_us(H100, "half") == pytest.approx(397 + 3, rel=0.01)
    # y is moved six times more: h @ B writes it, alpha * d reads and writes, y + d twice and once
    assert sum(k.bytes for k in rest) == pytest.approx(
        6 * 2 * 8192 * 4096 + 2 * 8192 * 4096, rel=0.02
    )


def forward_of(M, K, N, R=16, alpha=0.5, dtype=torch.bfloat16) -> regimes.Forward:
    sizes = ((M, K), (N, K), (N,), (K, R), (R, N))
    tensors = (torch.empty(s, dtype=dtype, device="meta") for s in sizes)
    return regimes.Forward(*tensors, alpha, H100)


def specialisations(monkeypatch, M, K, N, alpha=0.5, R=16) -> list:
    """Return what Triton compiles for at these sizes, over all regimes but decode and backward."""
    found = []

    def record(kernel, grid, *args, **options):
        found.append((kernel.__name__, specialisation("sm_90", kernel, args, options)))

    for module in (launch, regimes, gradients):
        monkeypatch.setattr(module, "launch", record)
    f = forward_of(M, K, N, R, alpha)
    p, can = Problem(M, K, N, R), launch.describable_product(f.x, f.w)
    for name in ("in_loop", "two_launches", "h_first", "torch_base"):
        regimes.FORWARD[name](f, choice.forward_tiles(name, p, H100, can)[0])
    f16 = forward_of(16, K, N, R, alpha)
    regimes.decode(f16, choice.forward_tiles("decode", Problem(16, K, N, R), H100, can)[0])
    dy, h = f.x.new_empty(M, N), f.x.new_empty(M, R)
    call = gradients.Backward(dy, f.x, f.weight, f.A, f.B, h, alpha, (True,) * 5, H100)
    for name in choice.BACKWARD:
        gradients.BACKWARD[name](call, choice.backward_tiles(name, p, H100, can)[0])
    return found


def test_a_new_size_or_alpha_does_not_recompile(monkeypatch):
    """Only Triton's own classes of an integer (one, a multiple of 16, another) compile anew."""
    first = specialisations(monkeypatch, 8192, 4096, 4096)
    assert len(first) == 12
    for M in (8191, 8193, 5001, 100_000):
        assert specialisations(monkeypatch, M, 4096, 4096) == first
    assert specialisations(monkeypatch, 8192, 4112, 11008) == first
    assert specialisations(monkeypatch, 8192, 4096, 4096, alpha=1.0) == first
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
    monkeypatch.setattr(gradients, "launch", lambda k, grid, *args, **opts: launched.append(opts))
    f = forward_of(8192, 4096, 4096)
    asked = tuple(needs == name for name in ("dx", "dweight", "dbias", "dA", "dB"))
    dy, h = f.x.new_empty(8192, 4096), f.x.new_empty(8192, 16)
    call = gradients.Backward(dy, f.x, f.weight, f.A, f.B, h, 0.5, asked, H100)
    tile = choice.backward_tiles("two_launches", Problem(8192, 4096, 4096, 16), H100, True)[0]
    dx, dA, dB = gradients.two_launches(call, tile)
    assert [dx is not None, dA is not None, dB is not None] == [asked[i] for i in (0, 3, 4)]
    assert [
        {k: int(opts[k]) for k in opts if k.startswith("WANT_")} for opts in launched
    ] == expected


def test_alpha_is_split_exactly_for_float16_alone():
    for alpha in (0.0, 1.0, -2.5, 1e5, 1e-6):
        factor, scale = launch.split_alpha(alpha, torch.float16)
        assert factor * scale == alpha and (0.5 <= abs(factor) < 1 or alpha == 0)
        assert launch.split_alpha(alpha, torch.bfloat16) == (alpha, 1.0)


def test_descriptors_only_where_strides_and_alignment_allow():
    matrix = torch.empty(64, 128, dtype=torch.bfloat16)
    assert launch.describable(matrix)
    assert not launch.describable(matrix.T)
    assert not launch.describable(matrix[:, 1:])  # 2 bytes off
    assert not launch.describable(torch.empty(64, 127, dtype=torch.bfloat16))
    assert not launch.describable(torch.empty(1, 128).expand(64, 128))  # stride 0
    assert launch.describable_product(matrix, torch.empty(128, 64).T)


def test_tuning_measures_once_a_bucket_and_keeps_the_winner(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(tuning.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "may_measure", lambda card: True)
    monkeypatch.setattr(
        tuning, "_measure", lambda run, c: measured.append(c) or -len(measured)
    )  # the last measured wins
    best = tuning.choose_forward(forward_of(8000, 4096, 4096), None, None)
    assert len(measured) == tuning.MEASURED and best == (measured[-1].name, measured[-1].tile)
    assert tuning.choose_forward(forward_of(5000, 4096, 4096), None, None) == best
    assert len(measured) == tuning.MEASURED  # the same bucket of M

    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    assert tuning.choose_forward(forward_of(8000, 4096, 4096), None, None) == best
    assert len(measured) == tuning.MEASURED
    file = tuning.tuning_file(H100)
    assert len(json.loads(file.read_text())) == 1 and list(file.parent.iterdir()) == [file]

    file.write_text("{ not json")
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning.choose_forward(forward_of(8000, 4096, 4096), None, None)
    assert len(measured) == 2 * tuning.MEASURED


def test_nothing_is_measured_in_a_capture_or_when_determinism_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    assert tuning.may_measure(H100)
    torch.use_deterministic_algorithms(True)
    assert not tuning.may_measure(H100)
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuning.may_measure(H100)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("LORA_EXT_TUNE", "0")
    assert not tuning.may_measure(H100)


def test_a_regime_forced_by_name_is_taken_where_it_can_run():
    call = forward_of(8192, 4096, 4096)
    assert tuning.choose_forward(call, "h_first", None)[0] == "h_first"
    assert (
        tuning.choose_forward(forward_of(8192, 4096, 4096, R=100), "in_loop", None)[0] != "in_loop"
    )


def test_family_of_an_unlisted_capability_asks_no_more_than_it_has():
    assert cards.family_of(9, 0) == "sm_90" and cards.family_of(8, 7) == "sm_80"
    assert cards.family_of(10, 3) == "sm_100" and cards.family_of(13, 0) == "sm_86"


def test_an_unknown_regime_is_named():
    with pytest.raises(ValueError, match="backward must be one of two_launches, torch_base, got"):
        with backend.regime(backward="in_loop"):
            pass
