"""Whatever is done to a model, in any order: y and dx are those of the values that it holds.

The long run is `make test-long`; a failure prints the steps that lead to it.
"""

import copy
import io
import pickle
import tempfile
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from lora_ext import (
    LinearWithLoRA,
    load_adapter,
    load_peft_adapter,
    mark_only_lora_as_trainable,
    merge_,
    prepack_,
    replace_linear_with_lora,
    save_adapter,
    save_peft_adapter,
    unmerge_,
    unpack_,
)
from lora_ext.testing import compare
from tests import EXAMPLES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TARGETS = [None, ["0"], ["1.0"], ["head"]]
SCALINGS = ["alpha", "alpha/rank", "alpha/sqrt(rank)"]


class Model(nn.Module):
    """Three linears, two of which can share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 33), nn.Sequential(nn.Linear(33, 20)))
        self.head = nn.Linear(20, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def plainly(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the model from the values that it holds, by PyTorch alone, in some dtype."""
    y = x.to(dtype)
    for layer in (model.body[0], model.body[1][0], model.head):
        linear = layer.linear if isinstance(layer, LinearWithLoRA) else layer
        bias = None if linear.bias is None else linear.bias.to(dtype)
        base = nn.functional.linear(y, linear.weight.to(dtype), bias)
        if isinstance(layer, LinearWithLoRA) and not layer._unmerged_weight:
            lora = layer.lora
            base = base + lora.scale * (y @ lora.A.to(dtype) @ lora.B.to(dtype))
        y = base
    return y


class Machine(RuleBasedStateMachine):
    """One model and what users do to it."""

    @initialize(seed=st.integers(0, 2**31))
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = Model()
        self.rows = 7

    @property
    def layers(self):
        return [m for m in self.model.modules() if isinstance(m, LinearWithLoRA)]

    def adapted(self):
        return bool(self.layers)

    def unmerged(self):
        return bool(self.layers) and not any(layer._unmerged_weight for layer in self.layers)

    @rule(
        rank=st.integers(1, 9),
        alpha=st.sampled_from([0.0, 0.5, 2, -3.0]),
        names=st.sampled_from(TARGETS),
        scaling=st.sampled_from(SCALINGS),
    )
    def replace(self, rank, alpha, names, scaling):
        replace_linear_with_lora(self.model, rank, alpha, target_modules=names, scaling=scaling)
        for layer in self.layers:
            if not layer.lora.B.any():
                nn.init.normal_(layer.lora.B, std=0.2)

    @precondition(adapted)
    @rule(backward=st.booleans())
    def prepack(self, backward):
        prepack_(self.model, backward=backward)

    @precondition(adapted)
    @rule()
    def unpack(self):
        unpack_(self.model)

    @precondition(adapted)
    @rule()
    def merge(self):
        merge_(self.model)

    @precondition(adapted)
    @rule()
    def merge_and_unmerge(self):
        before = [layer._unmerged_weight or [layer.weight] for layer in self.layers]
        before = [weights[0] for weights in before]
        merge_(self.model)
        unmerge_(self.model)
        after = [layer.weight for layer in self.layers]
        assert all(a is b for a, b in zip(after, before, strict=True))

    @precondition(unmerged)
    @rule()
    def merge_and_unload(self):
        merge_(self.model, unload=True)

    @precondition(unmerged)
    @rule(peft=st.booleans())
    def save_and_load(self, peft):
        """Into the model as it is, and into one without adapters."""
        plain = copy.deepcopy(self.model)
        for parent in list(plain.modules()):
            for name, child in parent._modules.items():
                if isinstance(child, LinearWithLoRA):
                    setattr(parent, name, child.linear)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a")
            (save_peft_adapter if peft else save_adapter)(self.model, path)
            if not peft:  # PEFT's has other rules of scaling
                load_adapter(self.model, path)
            (load_peft_adapter if peft else load_adapter)(plain, path)
        loaded = [m for m in plain.modules() if isinstance(m, LinearWithLoRA)]
        for a, b in zip(self.layers, loaded, strict=True):
            assert torch.equal(a.lora.A, b.lora.A) and torch.equal(a.lora.B, b.lora.B)
            assert abs(a.lora.scale - b.lora.scale) <= 1e-12 * abs(a.lora.scale)
        self.model = plain

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype):
        self.model.to(dtype)

    @precondition(adapted)
    @rule()
    def freeze(self):
        mark_only_lora_as_trainable(self.model)

    @rule()
    def unfreeze(self):
        self.model.requires_grad_(True)

    @rule(momentum=st.sampled_from([0.0, 0.9]))
    def optimiser_step(self, momentum):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            optimiser = torch.optim.SGD(trained, lr=1e-3, momentum=momentum)
            loss = self.model(torch.randn(self.rows, 20, dtype=self.dtype)).square().mean()
            if loss.requires_grad:  # merged and frozen, nothing on the way to it trains
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    @rule()
    def write_in_place(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.97)

    @rule()
    def give_new_weights(self):
        for name in ("weight", "bias"):
            old = getattr(self.model.body[0], name)
            setattr(self.model.body[0], name, nn.Parameter(0.2 * torch.randn_like(old)))

    @rule()
    def tie(self):
        self.model.head.weight = self.model.body[0].weight

    @rule()
    def pickled(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    @rule()
    def torch_saved(self):
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        self.model = torch.load(buffer, weights_only=False)

    @rule()
    def copied(self):
        self.model = copy.deepcopy(self.model)

    @precondition(lambda self: not self.adapted() or self.unmerged())
    @rule(assign=st.booleans())
    def state_loaded(self, assign):
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, assign=assign)

    @rule()
    def swapped(self):
        weight = self.model.body[1][0].weight
        torch.utils.swap_tensors(weight, nn.Parameter(0.2 * torch.randn_like(weight)))

    @rule(threads=st.integers(1, 3), rows=st.sampled_from([0, 1, 4, 7, 40]))
    def run_with(self, threads, rows):
        torch.set_num_threads(threads)
        self.rows = rows

    @rule(mode=st.booleans())
    def train(self, mode):
        self.model.train(mode)

    @property
    def dtype(self):
        return self.model.body[0].weight.dtype

    @invariant()
    def y_and_dx_are_those_of_the_values_held(self):
        eps = torch.finfo(self.dtype).eps
        x = torch.randn(self.rows, 20, dtype=self.dtype)
        dy = torch.randn(self.rows, 33, dtype=self.dtype)
        results = []
        for compute, dtype in (
            (self.model, self.dtype),
            (lambda t: plainly(self.model, t, self.dtype), self.dtype),
            (lambda t: plainly(self.model, t, torch.float64), torch.float64),
        ):
            leaf = x.detach().to(dtype).requires_grad_()
            y = compute(leaf)
            results.append((y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]))
        for name, ours, plain, exact in zip(("y", "dx"), *results, strict=True):
            assert ours.dtype == self.dtype
            # Three layers, each rounded once at least.
            for error in compare(name, ours, plain, exact, lambda norm, e=exact: 6 * eps * norm(e)):
                assert not error.broken, str(error)

    def teardown(self):
        torch.set_num_threads(1)


warnings.filterwarnings("ignore", "a prepacked weight is dropped")
TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=max(4, EXAMPLES // 6),
    stateful_step_count=25,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
