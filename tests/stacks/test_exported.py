"""Saved programs in another process, which imports lora_ext or can't."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_ext import (
    group_,
    lora_gated_mlp,
    prepack_,
    quantise_,
    replace_linear_with_lora,
)
from lora_ext.backends import BACKENDS
from tests.conftest import small_call
from tests.numerics import assert_same_up_to_rounding

pytestmark = pytest.mark.slow  # another process, and two exports

X = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
PROGRAMS = ("export", "export strict", "trace")
STRICT = ("plain", "grouped", "nf4")  # of the strict one
LOAD = """
import json, sys
import torch
folder, *programs = sys.argv[1:]
errors = {}
for access in ("absent", "imported"):
    if access == "absent":
        sys.modules["lora_ext"] = None  # an import raises
    else:
        del sys.modules["lora_ext"]
        import lora_ext
    for name in programs:
        file = f"{folder}/{name}.pt2"
        try:
            model = torch.jit.load(file) if name == "trace" else torch.export.load(file).module()
            with torch.no_grad():
                ys = [model(x) for x in torch.load(f"{folder}/xs")]
            torch.save(ys, f"{folder}/{name} {access}")
        except Exception as error:
            errors[f"{name} {access}"] = f"{type(error).__name__}: {error}"
print(json.dumps(errors))
"""


class Siblings(nn.Module):
    """Three linears of one x."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


class Gated(nn.Module):
    """A gated MLP, by `lora_gated_mlp`."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return lora_gated_mlp(x, self.gate, self.up, self.down, "silu")


class Every(nn.ModuleDict):
    """Models of one x, as one: an export takes a second by itself."""

    def forward(self, x):
        return {name: model(x) for name, model in self.items()}


def adapted(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    replace_linear_with_lora(model, 4, 0.5, dropout=dropout)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.B"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def every() -> nn.Module:
    torch.manual_seed(5)
    kinds = ("plain", "grouped", "nf4", "int8", "prepacked")
    model = Every({name: adapted(Siblings()) for name in kinds})
    model["gated"] = adapted(Gated())
    model["dropout"] = adapted(Siblings(), dropout=0.5)  # in eval
    report = group_(model["grouped"])
    for _ in range(2):  # the first shows who gets one tensor
        model["grouped"](X)
    assert "run q+k+v together" in str(report)
    quantise_(model["nf4"], "nf4")
    quantise_(model["int8"], "int8")
    prepack_(model["prepacked"])
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Return what the model gives here, and the other process' folder, errors and log."""
    folder = tmp_path_factory.mktemp("exported")
    model, rows = every(), ({0: torch.export.Dim("rows", min=1)},)
    torch.save([X, OTHER], folder / "xs")
    with torch.no_grad():
        here = [model(X), model(OTHER)]
        torch.jit.save(torch.jit.trace(model, X, strict=False), folder / "trace.pt2")
        for strict in (False, True):
            exported = Every({name: model[name] for name in STRICT}) if strict else model
            program = torch.export.export(exported, (X,), dynamic_shapes=rows, strict=strict)
            torch.export.save(program, folder / f"export{' strict' * strict}.pt2")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(folder), *PROGRAMS],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return here, folder, json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("access", ["imported", "absent"])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_saved_program_gives_the_same_in_another_process(loaded, name, access):
    here, folder, errors, said = loaded
    wrong = errors.get(f"{name} {access}", "")
    if name == "export strict" and access == "absent" and WITHOUT_CPP is None:  # operators of ours
        assert "RuntimeError: We ran into an error when deserializing" in wrong
        assert "failed to resolve torch.ops.lora_ext.linear_fwd.default to an operator" in said
        assert "Please import the custom op to register it" in said
        return
    assert not wrong
    for got, want in zip(torch.load(folder / f"{name} {access}"), here, strict=True):
        assert set(got) == set(STRICT if name == "export strict" else want)
        for kind, y in got.items():
            assert_same_up_to_rounding(y, want[kind])
