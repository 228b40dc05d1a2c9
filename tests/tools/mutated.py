"""What mutants.py makes faults in, and the tests that have to catch them."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.tools.faults import Fault, faults_in_cpp, faults_in_python

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """Sources and the tests that hold them."""

    sources: tuple[str, ...]  # globs
    tests: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    preloaded: tuple[str, ...] = ("peft",)
    seconds: int = 300  # of processor time
    again: bool = True  # all tests for what survives: a cache can hide what a test reaches


OP = tuple(
    f"tests/op/test_{name}.py"
    for name in "backends backward errors dropout autograd second_derivatives extremes grouped "
    "dropout_mask dropout_threads acts gated_mlp mlp codes memory testing".split()
)
KERNELS = ("tests/op/test_backends.py", "tests/op/test_backward.py")
PARTS = {  # triton first: peft imports it, and what it is imported as stays
    "triton": Part(  # kernels and their launches
        (
            "lora_ext/backends/triton/*_kernels.py",
            "lora_ext/backends/triton/*launches.py",
            "lora_ext/backends/triton/{mask,common}.py",
        ),
        (
            *KERNELS,
            *("tests/gpu/test_triton_mask.py", "tests/gpu/test_triton_persistent.py"),
            "tests/gpu/test_triton_common.py",
            "--backends=triton",
        ),
        environment=(("TRITON_INTERPRET", "1"),),
        preloaded=(),
        seconds=900,
        again=False,
    ),
    "regimes": Part(  # what is chosen for which card
        ("lora_ext/backends/triton/{__init__,regimes,cards,tuning}.py",),
        tuple(f"tests/gpu/test_{name}.py" for name in ("triton", "roofline", "host_time")),
        preloaded=(),
    ),
    "files": Part(
        ("lora_ext/adapters*.py", "lora_ext/files.py", "lora_ext/patterns.py"), ("tests/files",)
    ),
    "call": Part(
        (
            "lora_ext/{functional,call,ops,bases,dropout,checks}.py",
            "lora_ext/{called,codes,grouped,gated_mlp}.py",
            "lora_ext/backends/*.py",
        ),
        (
            *OP,
            *(
                f"tests/layers/test_{name}.py"
                for name in "layers explain quantised prepack prepack_stale".split()
            ),
            *("tests/tools/test_report.py", "tests/stacks/test_transforms.py"),
        ),
    ),
    "layers": Part(
        ("lora_ext/{layers,inject,prepack,panels,explain}.py",), ("tests/layers", "tests/files")
    ),
    "cpp": Part(
        ("csrc/cpu/*.h", "csrc/cpu/*.cpp", "csrc/call.*", "csrc/checks.*"),
        (
            *(*KERNELS, "tests/op/test_errors.py", "tests/op/test_cpp_checks.py"),
            *("tests/op/test_grouped.py", "tests/op/test_codes.py", "tests/op/test_acts.py"),
            *("tests/op/test_mlp.py", "tests/op/test_gated_mlp.py", "tests/op/test_pairs.py"),
            *("tests/op/test_cpp_keep.py", "tests/op/test_cpp_split.py"),
            *("tests/layers/test_prepack.py", "tests/layers/test_prepack_stale.py"),
        ),
        environment=(("LORA_EXT_CPU_ISA", "avx2"),),
        seconds=900,
    ),
}


def faults_of(part: Part) -> list[Fault]:
    """Return every fault that the rules make in a part."""
    found: list[Fault] = []
    for pattern in part.sources:
        choices = re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern)
        names = choices[2].split(",") if choices else [""]
        for name in names:
            one = f"{choices[1]}{name}{choices[3]}" if choices else pattern
            for path in sorted(ROOT.glob(one)):
                make = faults_in_python if path.suffix == ".py" else faults_in_cpp
                found += make(str(path.relative_to(ROOT)), path.read_text())
    return found
