"""group_ on MLPs without a gate: GPT-2's, and modules written by hand with dropout in them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_ext import LinearWithLoRA, group_, mark_only_lora_as_trainable, replace_linear_with_lora
from tests.stacks.grouped import X, assert_same_outcomes, assert_same_training, graph_of, train

transformers = pytest.importorskip("transformers")


def adapted(model: nn.Module, **kwargs) -> nn.Module:
    replace_linear_with_lora(model, 4, 2.0, dropout=0.2, dropout_mask="torch", **kwargs)
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.normal_(module.lora.B, std=0.1)
    return model


def gpt2(resid_pdrop: float) -> nn.Module:
    """Return GPT-2 with nn.Linear in place of its Conv1D."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, resid_pdrop=resid_pdrop, bos_token_id=1)
    model = transformers.GPT2LMHeadModel(config)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data = child.weight.detach().T.contiguous()
                linear.bias.data = child.bias.detach()
                setattr(parent, name, linear)
    adapted(model, target_modules=r"transformer\.h\..*")
    mark_only_lora_as_trainable(model)
    return model


@pytest.mark.parametrize("resid_pdrop", [0.0, 0.1])
def test_gpt2_trains_like_its_single_layers(resid_pdrop):
    single, model = gpt2(resid_pdrop), gpt2(resid_pdrop)
    report = group_(model)
    assert_same_training(train(model), train(single))
    states = [mlp.state() for mlp in report.mlps.values()]
    assert states == ["run as one operation"] * 2
    assert {mlp.act for mlp in report.mlps.values()} == {"gelu_tanh"}


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(s.nbytes() for address, s in kept.items() if address not in parameters)


def test_an_activation_written_out_is_kept_as_one_tensor():
    single = gpt2(0.0).transformer.h[0].mlp
    model = copy.deepcopy(single)
    group_(model)
    x = torch.randn(128, 48, requires_grad=True)
    of_x, of_hidden = x.nbytes, 4 * x.nbytes
    assert kept_bytes(model, x) <= of_x + of_hidden + 128 * 4 * 2 * 4 + 128 * (48 + 192) // 8
    assert kept_bytes(single, x) >= of_x + 4 * of_hidden


class MLP(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.dropout = nn.Dropout(0.3)
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


FORMULAS = {
    # name: (forward, whether it is one operation while its dropout is on, and while that is off)
    "dropout_last": (lambda m, x: m.dropout(m.down(F.relu(m.up(x)))), True, True),
    "dropout_between": (lambda m, x: m.down(m.dropout(F.gelu(m.up(x)))), False, True),
    "dropout_unused": (lambda m, x: m.down(F.silu(m.up(x))), False, True),
    "another_activation": (lambda m, x: m.down(m.up(x).tanh()), False, False),
    "residual": (lambda m, x: x + m.down(F.relu(m.up(x))), False, False),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_module_is_an_mlp_by_what_it_computes(name):
    formula, while_on, while_off = FORMULAS[name]
    torch.manual_seed(0)
    single = adapted(MLP(formula))
    model = copy.deepcopy(single)
    group_(model)
    assert model.dropout.p == 0.3 and all(m.training for m in model.modules())
    for p, one in ((0.3, while_on), (0.0, while_off), (0.3, while_on)):
        model.dropout.p = single.dropout.p = p
        assert_same_outcomes(model, single, X, 1)
        names = graph_of(model(X.clone().requires_grad_()))
        assert ("_GatedMLPBackward" in names) == one


def test_a_sequential_is_an_mlp_too():
    torch.manual_seed(0)
    single = adapted(nn.Sequential(nn.Linear(24, 24), nn.ReLU(inplace=True), nn.Linear(24, 24)))
    model = copy.deepcopy(single)
    (mlp,) = group_(model).mlps.values()
    assert (mlp.first, mlp.down, mlp.act) == (("0",), "2", "relu")
    assert_same_outcomes(model, single, X)


def sequential_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(24, 40), nn.Sequential(nn.GELU()), nn.Dropout(0.0), nn.Identity()]
    return adapted(nn.Sequential(*parts, nn.Linear(40, 24), nn.Identity()))


def test_what_does_nothing_may_stand_anywhere():
    single = sequential_mlp()
    model = copy.deepcopy(single)
    (mlp,) = group_(model).mlps.values()
    assert (mlp.first, mlp.down, mlp.act) == (("0",), "4", "gelu")
    assert_same_outcomes(model, single, X)
    model[3], single[3] = nn.ReLU(), nn.ReLU()
    assert_same_outcomes(model, single, X)


@pytest.mark.parametrize("name", ["1", "1.0", "2", "3", "5"])
def test_hooks_on_what_is_passed_by_run(name):
    single = sequential_mlp()
    model = copy.deepcopy(single)
    report = group_(model)
    assert_same_outcomes(model, single, X)
    handles = [
        m.get_submodule(name).register_forward_hook(lambda *o: 2 * o[-1]) for m in (model, single)
    ]
    assert_same_outcomes(model, single, X)
    assert f"{name[0]} has hooks" in str(report)
    for handle in handles:
        handle.remove()
    assert "_GatedMLPBackward" in graph_of(model(X.clone().requires_grad_()))
    model.get_submodule(name).forward = lambda x: x
    single.get_submodule(name).forward = lambda x: x
    assert_same_outcomes(model, single, X)


class Written(nn.Module):
    """GPT-2's gelu in seven operations, of which a half dtype rounds each."""

    def __init__(self, factor=0.044715, most=torch.inf):
        super().__init__()
        self.factor, self.most = factor, most

    def forward(self, x):
        inner = (2 / torch.pi) ** 0.5 * (x + self.factor * x.pow(3))
        return (0.5 * x * (1.0 + torch.tanh(inner))).clamp(max=self.most)


WRITTEN = {  # an activation, and whether it is one of ours
    "gelu": (Written(), 1),
    "another": (Written(0.045), 0),
    "clamped": (Written(most=99), 0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_an_activation_written_out_is_known_in_half_dtypes(name, dtype):
    """It rounds more often than ours, so it is known by float32; near ones are none of ours."""
    act, found = WRITTEN[name]
    torch.manual_seed(0)
    single = adapted(nn.Sequential(nn.Linear(24, 40), act, nn.Linear(40, 24)).to(dtype))
    model = copy.deepcopy(single)
    mlps = group_(model).mlps
    assert [mlp.act for mlp in mlps.values()] == ["gelu_tanh"] * found
    results = []
    for each in (model, single, copy.deepcopy(single).double()):
        torch.manual_seed(5)
        x = X.to(dtype).to(each[0].linear.weight.dtype).requires_grad_()
        y = each(x)
        y.float().square().sum().backward()
        results.append((y.detach().double(), x.grad.double()))
    for ours, plain, exact in zip(*results, strict=True):
        off = (ours - exact).abs().max()
        limit = 2 * (plain - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert off <= limit
