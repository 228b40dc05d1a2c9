"""The plain layer, and the one error rule that every backend is held to.

For tests, benchmarks, the self-test of `python -m lora_ext`, and a backend of your own. A backend
is a module with `unsupported`, `forward` and `backward` (lora_ext/backends/__init__.py says what
they take). Three lines hold one to the rule:

    >>> from lora_ext.backends import reference as my_backend
    >>> from lora_ext.testing import check_backend
    >>> check_backend(my_backend)  # the cases that it refused, and why: none
    {}

A function that is called like `lora_linear` is held to it by `check`:

    >>> from lora_ext import lora_linear
    >>> from lora_ext.testing import Case, check
    >>> check(lora_linear, Case((37,), K=96, N=160, R=8))

Three subjects: `plain` has the layer as people write it by hand, `cases` the problems, `rule` the
rule. Nothing but torch and the standard library is imported.
"""

from .backend import NEEDS, check_backend, make_call, possible, run_backend
from .cases import (
    DTYPES,
    LAYOUTS,
    MASKED,
    NAMES,
    OF_CODES,
    SHAPES,
    TAILS,
    WITHOUT_BASE,
    Case,
    every_case,
    make_inputs,
)
from .plain import LinearWithLoRA, LoRALayer, replace_linear_with_lora
from .rule import (
    NORMS,
    Error,
    Expected,
    Linear,
    broken_rules,
    check,
    compare,
    errors,
    expect,
    expected,
    gradients,
    plain_linear,
)

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MASKED",
    "NAMES",
    "NEEDS",
    "NORMS",
    "SHAPES",
    "TAILS",
    "OF_CODES",
    "WITHOUT_BASE",
    "Case",
    "Error",
    "Expected",
    "Linear",
    "LinearWithLoRA",
    "LoRALayer",
    "broken_rules",
    "check",
    "check_backend",
    "compare",
    "errors",
    "every_case",
    "expect",
    "expected",
    "gradients",
    "make_call",
    "make_inputs",
    "plain_linear",
    "possible",
    "replace_linear_with_lora",
    "run_backend",
]
