"""What the tests of prepack_ share: where they run, a model, and every dtype laid out."""

import pytest
from torch import manual_seed, nn

import lora_ext
from lora_ext import replace_linear_with_lora
from lora_ext.backends import BACKENDS
from tests.conftest import small_call

WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
NEEDS_CPP = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))


def let_every_dtype_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay weights out where PyTorch's own product is the faster one too: the numbers stay."""
    from lora_ext import _C

    info = _C.build_info() | {"own_products": ["float32", "bfloat16", "float16"]}
    monkeypatch.setattr(_C, "build_info", lambda: info)


def two_layers() -> nn.Sequential:
    """Return two frozen layers with adapters, (48, 80) and (80, 33), B random."""
    manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 33))
    replace_linear_with_lora(model, 4, 0.7)
    lora_ext.mark_only_lora_as_trainable(model)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora.B)
    return model
