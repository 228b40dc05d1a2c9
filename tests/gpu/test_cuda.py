"""What only a GPU shows: real sizes, CUDA graphs, no synchronisation, offsets past 2^31."""

import pytest
import torch

from benchmarks import Shape, make_case
from benchmarks.bases import Unavailable
from benchmarks.bench_linear import Gate
from benchmarks.providers import PROVIDERS
from lora_ext import lora_linear
from lora_ext.backends import BACKENDS
from lora_ext.backends.triton.regimes import REGIMES
from tests.conftest import small_call

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"
)

KERNELS = ["triton", "cpp"]  # backends with kernels of their own
WAYS = [*KERNELS, *(f"triton.{name}" for name in REGIMES["forward"])]
SHAPES = [Shape(16, 4096, 4096, 16), Shape(1000, 1024, 2048, 64), Shape(300, 1000, 777, 12)]
GIB = 2**30


def skip_unless_it_runs(name: str, device: str = "cuda") -> None:
    reason = BACKENDS[name].unsupported(small_call(device))
    if reason is not None:
        pytest.skip(reason)


def step_of(way: str, shape: Shape, dtype: torch.dtype, mode: str, dropout: float = 0.0):
    case = make_case(shape, "cuda", dtype, mode, dropout=dropout)
    try:
        return case, PROVIDERS[way](case)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_regime_passes_the_benchmarks_gate_and_repeats_its_bits(way, shape, dtype, mode):
    case, step = step_of(way, shape, dtype, mode)
    with torch.set_grad_enabled(case.training):
        Gate(case).check(step)
        first = step.results()
        for _ in range(3):
            assert all(torch.equal(first[name], t) for name, t in step.results().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_mask_passes_the_benchmarks_gate(way, dtype):
    case, step = step_of(way, SHAPES[2], dtype, "fwd_bwd", dropout=0.1)
    Gate(case).check(step)


@pytest.mark.parametrize("size", [(1, 1), (37, 96), (300, 1025), (8192, 4096)], ids=str)
def test_the_masks_bits_are_the_cpus(size):
    draw, pack = torch.ops.lora_ext.draw_keep, torch.ops.lora_ext.pack_keep
    seed = torch.tensor([5, 9])
    for p, first in ((0.0, 0), (0.05, 17), (1.0, 2**33)):
        assert torch.equal(draw(seed.cuda(), *size, p, first).cpu(), draw(seed, *size, p, first))
    mask = torch.empty(size, dtype=torch.bool, device="cuda").bernoulli_(0.9)
    for given in (mask, mask.byte(), mask.T.contiguous().T, mask.half()):
        assert torch.equal(pack(given).cpu(), pack(mask.cpu()))


def test_more_than_2_to_the_31_elements_of_a_mask():
    if torch.cuda.mem_get_info()[0] < 6 * GIB:
        pytest.skip("needs 6 GiB of free GPU memory")
    rows, cols = 2**18 + 3, 2**13 + 5
    seed = torch.tensor([5, 6])
    bits = torch.ops.lora_ext.draw_keep(seed.cuda(), rows, cols, 0.3)
    assert torch.equal(bits.cpu(), torch.ops.lora_ext.draw_keep(seed, rows, cols, 0.3))
    mask = torch.zeros(rows, cols, dtype=torch.bool, device="cuda")
    mask[-3:] = torch.rand(3, cols, device="cuda") < 0.5
    packed = torch.ops.lora_ext.pack_keep(mask)
    assert torch.equal(packed[-3:], torch.ops.lora_ext.pack_keep(mask[-3:]))
    assert not packed[:-3].any()


@pytest.mark.parametrize("draw", ["hash", "torch"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_captured_graph_draws_a_new_mask_at_each_replay(name, draw):
    """Its own backward has the same mask: with A = B = 1 and no weight, y is keep * x."""
    skip_unless_it_runs(name)
    eye, zero = torch.eye(64, device="cuda"), torch.zeros(64, 64, device="cuda")
    x = torch.ones(256, 64, device="cuda", requires_grad=True)

    def step():
        y = lora_linear(x, zero, None, eye, eye, 0.5, backend=name, dropout=0.5, dropout_mask=draw)
        return y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    masks = []
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(y, dx)
        masks.append(y != 0)
        assert 0.45 < masks[-1].float().mean() < 0.55
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("way", WAYS)
def test_a_captured_graph_replays_eager_bits(way, mode):
    """Weights and x may change between replays: only their places are captured."""
    case, step = step_of(way, Shape(64, 1024, 2048, 16), torch.bfloat16, mode)
    with torch.set_grad_enabled(case.training):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step.results()  # warm: compiled, and measured where it measures
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step.results()
        with torch.no_grad():
            case.x.mul_(-0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(captured[name], t) for name, t in step.results().items())


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("way", WAYS)
def test_a_warm_call_does_not_wait_for_the_device(way, mode):
    case, step = step_of(way, SHAPES[1], torch.bfloat16, mode)
    with torch.set_grad_enabled(case.training):
        step.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):
                case.x.sum().item()  # which waits, and has to show
            step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(2**17 + 5, 64, 2**14, 16), (2**17 + 5, 2**14, 64, 16)], ids=str)
def test_offsets_past_2_to_the_31_elements(shape, name):
    """First y and dy, then x and dx, of 2.15e9 elements: the last rows are a small call's."""
    skip_unless_it_runs(name)
    M, K, N, R = shape
    if torch.cuda.mem_get_info()[0] < 24 * GIB:
        pytest.skip("needs 24 GiB of free GPU memory")
    case = make_case(Shape(512, K, N, R), "cuda", torch.bfloat16, "fwd")
    rest = (case.weight, case.bias, case.A.requires_grad_(), case.B.requires_grad_(), case.alpha)

    def run(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        y = lora_linear(x, *rest, backend=name)
        y_last = y[-512:].detach().clone()
        return [y_last, *torch.autograd.grad(y, (x, case.A, case.B), dy)]

    large_x = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
    large_dy = torch.zeros(M, N, dtype=torch.bfloat16, device="cuda")
    large_x[-512:], large_dy[-512:] = case.x, case.dy
    y, dx, dA, dB = run(large_x, large_dy)
    want_y, want_dx, want_dA, want_dB = run(case.x, case.dy)
    # The rows before are zeros and add nothing; a sum in another order rounds to a neighbour.
    for got, want in ((y, want_y), (dx[-512:], want_dx), (dA, want_dA), (dB, want_dB)):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-8 * want.abs().max().item())


@pytest.mark.parametrize("name", KERNELS)
def test_the_current_device_need_not_be_the_tensors(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    skip_unless_it_runs(name, "cuda:1")
    case = make_case(SHAPES[1], "cuda:1", torch.bfloat16, "fwd")
    arguments = (case.x, case.weight, case.bias, case.A, case.B, case.alpha)
    y = lora_linear(*arguments, backend=name)
    assert y.device == case.x.device and y.isfinite().all()
