"""Run the C++ kernels where a fault of memory ends the process: LIBRARY cases|threads|past|before.

LIBRARY takes the place of lora_ext._C, or is "installed".
"""

import ctypes
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.tools.library import load

if sys.argv[1] != "installed":
    load(Path(sys.argv[1]))

from lora_ext import load_adapter, prepack_, replace_linear_with_lora, save_adapter  # noqa: E402
from lora_ext.testing import LAYOUTS, OF_CODES, SHAPES, TAILS, Case, check  # noqa: E402
from tests.conftest import linear_of  # noqa: E402
from tests.op.groups import GROUPS, refused_group  # noqa: E402

THREADS, CALLS = 8, 3
# More than a block of each kind, which is more than one part of the work.
LONG = Case((400,), 404, 264, 8, dropout=0.3)


def cases() -> None:
    """Hold every kind of problem to the error rule; the sanitizer looks at the memory."""
    small = [case for case in SHAPES if case.M * case.K * case.N < 2**19]
    laid_out = [TAILS.but(layout=name) for name in LAYOUTS]
    coded = [case for case in OF_CODES if case.M < 100]
    for case in [*small, *laid_out, *coded, LONG, TAILS.but(dropout=0.3), TAILS.but(base=False)]:
        for dtype in (torch.float32, torch.bfloat16):
            check(linear_of("cpp"), case.but(dtype=dtype))
    for case in (TAILS, LONG):
        check(linear_of("cpp"), case.but(dtype=torch.float64))
        check(linear_of("cpp"), case.but(dtype=torch.float16, adapter_dtype=torch.float32))
    assert (why := refused_group("cpp", names=[n for n in GROUPS if n != "six"])) is None, why


def threads() -> None:
    """Train, infer, prepack, save and load from several threads at once, each its own model."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one_thread, range(THREADS), [folder] * THREADS))


def one_thread(number: int, folder: str) -> None:
    """Do what a user's thread does; the first call of all chooses the instruction set."""
    path = Path(folder, str(number))
    for call in range(CALLS):
        model = torch.nn.Sequential(torch.nn.Linear(LONG.K, LONG.N), torch.nn.Linear(LONG.N, 40))
        replace_linear_with_lora(model, 8, 1.0, dropout=0.3 * (call % 2))
        if call % 3 == 1:
            model.requires_grad_(False)
            prepack_(model, backward=True)
        x = torch.randn(LONG.M, LONG.K, requires_grad=True)
        model(x).sum().backward()
        save_adapter(model, path)
        load_adapter(model, path)
        with torch.no_grad():
            model(x[:3])


def past() -> None:
    """Read the byte after a tensor."""
    t = torch.ones(64)
    ctypes.string_at(t.data_ptr() + t.nbytes, 1)


def before() -> None:
    """Read the byte before a tensor."""
    ctypes.string_at(torch.ones(64).data_ptr() - 1, 1)


if __name__ == "__main__":
    {"cases": cases, "threads": threads, "past": past, "before": before}[sys.argv[2]]()
    print("ran")
