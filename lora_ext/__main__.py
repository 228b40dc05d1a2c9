"""`python -m lora_ext`: what was found, which backend runs and why, a self-test, and the gain."""

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

import lora_ext
from lora_ext.backends import BACKENDS, choose, cpp, unsupported_reasons
from lora_ext.call import Call, LowRank, Weight
from lora_ext.gains import STEP, hints, measured, routes
from lora_ext.testing import Case, broken_rules, errors, expect, gradients, make_inputs

# No size is a multiple of every block.
_SELF_TEST = [Case((37,), 96, 160, 8, dtype) for dtype in (torch.float32, torch.bfloat16)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 0 when all that can run is right, and what is expected can run.

    The extension is expected wherever its file is installed.
    """
    parser = argparse.ArgumentParser(prog="python -m lora_ext", description=__doc__)
    help_ = "fail unless this backend can run on some device here; may be given again"
    parser.add_argument("--expect", action="append", default=[], choices=BACKENDS, help=help_)
    expected = parser.parse_args(argv).expect
    if find_spec("lora_ext._C") is not None:
        expected.append("cpp")
    _print_table("found", _found())
    for device in ("cpu", "cuda"):
        _print_table(f"backends for {device}", _choices(device))
    why_not = {device: _reasons(device) for device in _devices()}
    _print_table("whose product makes y = x @ weight.T on this CPU", routes(why_not["cpu"]["cpp"]))
    results = list(_self_tests())
    _print_table("self-test", results)
    wrong = [name for name, result in results if not result.startswith("passed")]
    if wrong:
        print(f"lora_ext {lora_ext.__version__} is NOT right on this machine: {', '.join(wrong)}")
        return 1
    _print_table(f"plain layer's time over ours here, {STEP}", measured())
    _print_table("what would make it faster", list(hints(why_not)) or [("nothing", "known here")])
    for name in expected:
        if all(reasons := [of[name] for of in why_not.values()]):
            print(f"backend {name!r} is expected and can't run here: {reasons[0]}")
            return 1
    runs = " and ".join(f"on {d} with backend {_first_that_runs(d)!r}" for d in why_not)
    print(f"lora_ext {lora_ext.__version__} works {runs}.")
    return 0


def _found() -> Iterator[tuple[str, str]]:
    yield "lora_ext", lora_ext.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    yield "cpu", f"{_cpu_name()}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", str(torch.get_num_threads())
    cuda = torch.version.cuda or torch.version.hip
    yield (
        "torch",
        f"{torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'for the CPU only'}",
    )
    yield "gpu", _gpu()
    yield "triton", _version("triton")
    yield "compiler", _compiler()
    yield "extension", _extension()
    yield "cuda kernels", cpp.load_cuda() or "loaded"


def _choices(device: str) -> Iterator[tuple[str, str]]:
    """Each backend's answer for a float32 layer on `device`."""
    if device == "cuda" and not torch.cuda.is_available():
        yield from ((name, "not tried, PyTorch finds no CUDA device") for name in BACKENDS)
        return
    chosen = _first_that_runs(device)
    for name, reason in _reasons(device).items():
        yield name, reason or ("runs" if name == chosen else f"can run, comes after {chosen}")


def _self_tests() -> Iterator[tuple[str, str]]:
    """Run every backend that can run on every device there is, against float64."""
    for device in _devices():
        for name, reason in _reasons(device).items():
            if reason is None:
                try:
                    yield f"{name} on {device}", _compare(name, device)
                except Exception as error:  # a report has to reach its end
                    yield f"{name} on {device}", f"failed: {type(error).__name__}: {error}"


def _compare(name: str, device: str) -> str:
    """Hold the forward and every gradient to the error rule, in each dtype."""
    linear = partial(lora_ext.lora_linear, backend=name)
    broken, said = [], []
    for case in _SELF_TEST:
        with torch.device(device):
            want = expect(make_inputs(case), case.alpha)
            got = gradients(linear, want.inputs, case.alpha)
        broken += broken_rules(got, want)
        worst = max(error.share for error in errors(got, want))
        said.append(f"{worst:.0%} in {str(case.dtype)[6:]}")
    if broken:
        return f"failed: {broken[0]}"
    return f"passed: y and five gradients, error at most {', '.join(said)} of what is allowed"


def _devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def _reasons(device: str) -> dict[str, str | None]:
    return unsupported_reasons(_small_call(device))


def _first_that_runs(device: str) -> str:
    return choose(None, _small_call(device))


def _small_call(device: str) -> Call:
    x = torch.zeros(8, 8, device=device)
    return Call(x, Weight(x), None, LowRank(x, x, 1.0))


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch finds"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _extension() -> str:
    """Say with what lora_ext._C was built, or why it is not there."""
    if find_spec("lora_ext._C") is None:
        return "not built"
    try:
        info = import_module("lora_ext._C").build_info()
    except ImportError as error:
        return f"does not load: {error}"
    cuda = "without CUDA" if info["cuda"] == "none" else f"with CUDA {info['cuda']}"
    return (
        f"built with torch {info['torch']}, {info['compiler']} and {cuda}; "
        f"CPU kernels use {info['cpu_isa']}"
    )


def _compiler() -> str:
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return "none: building the extension needs one (g++ 12 or later)"
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return version.stdout.partition("\n")[0] or path


def _version(package: str) -> str:
    if find_spec(package) is None:
        return "none"
    return str(getattr(__import__(package), "__version__", "unknown version"))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    print(f"{title}:")
    for name, value in rows:
        print(f"  {name + ':':<18} {value}")


if __name__ == "__main__":
    sys.exit(main())
