"""DoRA with a small dropout: the products of x and of the dropped x, from one of them."""

import pytest
import torch

from lora_ext import dora_dropped
from lora_ext.dora_dropped import both_products, is_few
from lora_ext.dropout import pack_bits
from lora_ext.testing.parity import Parity, check_parity, why_skipped

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="sparse products are MKL's"
)
P = 0.1


def operands(M, K, N, dtype, *, way="contiguous"):
    g = torch.Generator().manual_seed(M + K)
    x = torch.randn(M, K, generator=g).to(dtype)
    weight = torch.randn(N, K, generator=g).to(dtype)
    if way == "transposed":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    mask = torch.rand(M, K, generator=g) >= P
    mask[0], mask[-1] = True, False  # a row without a dropped element, and one without another
    return x.requires_grad_(), weight, mask


def plain(x, weight, mask):
    return x @ weight.T, (mask * x) @ weight.T / (1 - P)


@pytest.mark.parametrize("way", ["contiguous", "transposed"])
@pytest.mark.parametrize("sizes", [(70, 91, 67), (5, 8, 3), (64, 1, 1)], ids=str)
def test_products_and_gradient_are_those_of_two(sizes, way):
    """In float32 next to float64, against two products in float32."""
    x, weight, mask = operands(*sizes, torch.float32, way=way)
    dy = torch.randn(2, sizes[0], sizes[2], generator=torch.Generator().manual_seed(1))

    def results(of, x, weight, *more):
        x = x.detach().requires_grad_()
        ys = of(x, weight, *more)
        torch.autograd.backward(ys, [part.to(x.dtype) for part in dy])
        return [y.detach().double() for y in (*ys, x.grad)]

    exact = results(plain, x.double(), weight.double(), mask)
    ours = results(both_products, x, weight, pack_bits(mask), P)
    others = results(plain, x, weight, mask)
    for mine, other, right in zip(ours, others, exact, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * right.norm()
        assert (mine - right).norm() <= 2 * (other - right).norm() + floor


def test_where_x_is_dropped_its_gradient_is_that_of_the_plain_product_alone():
    """To the last digits, however large the gradient of the dropped product is."""
    x, weight, mask = operands(70, 91, 67, torch.float32)
    y, dropped = both_products(x, weight, pack_bits(mask), P)
    (y.sum() + 1e8 * dropped.sum()).backward()
    want = weight.sum(0).expand(70, 91)
    torch.testing.assert_close(x.grad[~mask], want[~mask], rtol=1e-4, atol=1e-4)
    assert (x.grad[mask].abs() > 1e4).any()


def test_both_derivatives_are_right():
    x, weight, mask = operands(6, 9, 5, torch.float64)
    keep = pack_bits(mask)
    assert torch.autograd.gradcheck(lambda x: both_products(x, weight, keep, P), x)
    assert torch.autograd.gradgradcheck(lambda x: both_products(x.sin(), weight, keep, P), x)


def test_two_products_are_taken_where_one_is_not_faster():
    x, weight = torch.randn(8, 16, 9), torch.randn(7, 9)
    assert is_few(x, weight, 0.05)
    assert not is_few(x, weight, 0.0) and not is_few(x, weight, 0.2)
    assert not is_few(x[:1], weight, 0.05) and not is_few(x[..., :0], weight[:, :0], 0.05)
    assert not is_few(x.bfloat16(), weight.bfloat16(), 0.05)
    assert not is_few(x, weight.clone().requires_grad_(), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_few(x, weight, 0.05)


@pytest.mark.parametrize("feature", ["DoRA", "several adapters, DoRA"])
@pytest.mark.parametrize("base", ["nn.Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_layer_is_as_close_to_float64_as_pefts_own(monkeypatch, feature, base, dtype):
    """With its masks, of a small layer too."""
    case = Parity(feature, base, dtype, dropout=0.05)
    if why := why_skipped(case):
        pytest.skip(why)
    seen, own = [], dora_dropped.both_products
    monkeypatch.setattr(dora_dropped, "_LEAST_ROWS", 1)
    monkeypatch.setattr(
        "lora_ext.integrations.peft_forward.both_products",
        lambda *given: seen.append(given) or own(*given),
    )
    check_parity(case)
    assert len(seen) == (1 if feature == "DoRA" else 0)  # y of an adapter before is there already
