"""prepack_(): a layout is dropped once its weight has changed, and no copy or file has one."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, prepack_
from tests.layers.prepacked import NEEDS_CPP, let_every_dtype_pay, two_layers
from tests.op.pairs import forced_pairs

pytestmark = NEEDS_CPP


@pytest.fixture(autouse=True)
def every_dtype_pays(monkeypatch):
    let_every_dtype_pay(monkeypatch)


@pytest.fixture
def model():
    return two_layers()


def _replace_data(layer):
    layer.weight.data = layer.weight.data * 2


CHANGES = {
    "written": (lambda layer: layer.weight.mul_(2), "written to"),
    "replaced": (lambda layer: setattr(layer, "weight", copy.deepcopy(layer.weight)), "another"),
    # Twice: the address that the first one frees may come back.
    "data_replaced_twice": (
        lambda layer: [_replace_data(layer) for _ in range(2)],
        "moved or repl",
    ),
    "data_replaced": (
        lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
        "moved or replaced",
    ),
    "unfrozen": (lambda layer: layer.weight.requires_grad_(), "requires grad"),
    "loaded": (lambda layer: layer.load_state_dict(layer.state_dict()), "written to"),
    "cast": (lambda layer: layer.to(torch.float64), "moved or replaced"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_drops_its_layout_and_says_so(model, change):
    act, why = CHANGES[change]
    prepack_(model)
    layer = model[0]
    with pytest.warns(UserWarning, match=f"a prepacked weight is dropped: .*{why}"):
        with torch.no_grad():
            act(layer)
        x = torch.randn(40, 48, dtype=layer.weight.dtype)
        y = layer(x)
    assert layer._panels is None and model[2]._panels is not None
    want = layer.linear(x) + layer.lora(x)
    torch.testing.assert_close(y, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        layer(x)


def test_to_drops_the_layout_without_a_call(model):
    prepack_(model)
    with pytest.warns(UserWarning, match="dropped"):
        model.to(torch.bfloat16)
    assert model[0]._panels is None


def test_the_same_storage_read_otherwise_drops_it():
    layer = LinearWithLoRA(nn.Linear(64, 64).requires_grad_(False), 2, 1.0)
    prepack_(layer)
    layer.weight.data = layer.weight.data.t()
    x = torch.randn(40, 64)
    with pytest.warns(UserWarning, match="moved or replaced"):
        y = layer(x)
    torch.testing.assert_close(y, layer.linear(x) + layer.lora(x))


def test_a_prepacked_model_can_swap_its_parameters(model):
    prepack_(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.warns(UserWarning, match="dropped"):
            model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = torch.randn(40, 48, dtype=torch.float64)
    torch.testing.assert_close(model[0](x), model[0].linear(x) + model[0].lora(x))


@pytest.mark.parametrize("pairs", [False, True], ids=["floats", "pairs"])
def test_of_bfloat16_the_layout_stays_with_its_layer(model, pairs, tmp_path):
    """Read, dropped when stale, and in no copy or file: of 2 bytes an element by pairs, else 4."""
    model.to(torch.bfloat16)
    x = torch.randn(40, 48).to(torch.bfloat16)
    with forced_pairs(pairs):
        plain = model(x)
        report = prepack_(model)
        assert report.packed == ["0", "2"]
        elements = 48 * 80 + 80 * 48  # 33 columns take three panels of 16
        assert report.mib == pytest.approx((2 if pairs else 4) * elements / 2**20)
        assert torch.equal(model(x), plain)
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert other[0]._panels is None and torch.equal(other(x), plain)
        with pytest.warns(UserWarning, match="a prepacked weight is dropped: .*written to"):
            with torch.no_grad():
                model[0].weight.mul_(2)
            assert not torch.equal(model(x), plain)
        assert model[0]._panels is None


def test_copies_and_files_go_without(model, tmp_path):
    x = torch.randn(40, 48)
    plain = copy.deepcopy(model)
    prepack_(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.save(model, tmp_path / "model.pt")
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "file": torch.load(tmp_path / "model.pt", weights_only=False),
    }
    for name, other in copies.items():
        assert other[0]._panels is None, name
        assert torch.equal(other(x), plain(x)), name
        prepack_(other)
        assert torch.equal(other(x), model(x)), name
    assert model[0]._panels is not None


def test_autocast_goes_without(model):
    """The weight is cast there, and the layout is the old dtype's."""
    x = torch.randn(40, 48)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        prepack_(model)
        assert torch.equal(model(x), want)


def test_a_compiled_model_goes_without(model):
    prepack_(model)
    x = torch.randn(40, 48)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
