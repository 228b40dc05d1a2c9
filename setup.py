"""Build the extension module lora_ext._C; everything else is in pyproject.toml.

LORA_EXT_BUILD=auto (default) or cpu builds it, none makes a pure-Python package.
"""

import os
from pathlib import Path

from setuptools import setup

# 2.11, the oldest torch whose stable ABI has all that csrc calls: one binary serves it and later.
TORCH_TARGET_VERSION = "0x020b000000000000"


def build_arguments() -> dict:
    """Return setup()'s arguments for what LORA_EXT_BUILD asks for."""
    choice = os.environ.get("LORA_EXT_BUILD", "auto")
    if choice not in ("auto", "cpu", "none"):
        raise SystemExit(f"LORA_EXT_BUILD must be auto, cpu or none, got {choice!r}")
    if choice == "none":
        print("lora_ext: LORA_EXT_BUILD=none, the C++ kernels are not built")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "lora_ext._C",
        sorted(map(str, Path("csrc").glob("*.cpp")))
        + sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        # No -march: each kernel file names the instruction set it is compiled for.
        extra_compile_args="-O3 -g0 -std=c++20 -Wall -ffp-contract=fast -fno-math-errno".split(),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**build_arguments())
