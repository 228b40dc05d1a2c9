"""`python -m lora_ext`: what was found, which backend would run and why, and a self-test."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch

import lora_ext
from lora_ext.backends import BACKENDS, choose, cpp, unsupported_reasons
from lora_ext.call import Call, LowRank, Weight

_SELF_TEST_SHAPE = (37, 96, 160, 8)  # M, K, N, R: no size a multiple of every block
# The largest error allowed, of the largest value. Sums of up to 160 products: in float32
# sqrt(160) roundings of 6e-8, with room for the order; in bfloat16 three roundings of 2e-3, of h
# or t, of it times alpha and of the result.
_BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


def main() -> int:
    """Print the report; return 0 when every backend that can run passed its self-test."""
    _print_table("found", _found())
    for device in ("cpu", "cuda"):
        _print_table(f"backends for {device}", _choices(device))
    results = list(_self_tests())
    _print_table("self-test", results)
    failed = [name for name, result in results if not result.startswith("passed")]
    if failed:
        print(f"lora_ext {lora_ext.__version__} is NOT right on this machine: {', '.join(failed)}")
        return 1
    first = _first_that_runs("cpu")
    runs = f"on cpu with backend {first!r}"
    if torch.cuda.is_available():
        runs += f" and on cuda with backend {_first_that_runs('cuda')!r}"
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
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for name, reason in _reasons(device).items():
            if reason is None:
                try:
                    yield f"{name} on {device}", _compare(name, device)
                except Exception as error:  # a report has to reach its end
                    yield f"{name} on {device}", f"failed: {type(error).__name__}: {error}"


def _compare(name: str, device: str) -> str:
    """Forward and every gradient in each dtype against the reference in float64."""
    errors = {dtype: _error(name, device, dtype) for dtype in _BOUNDS}
    good = all(errors[dtype] < bound for dtype, bound in _BOUNDS.items())  # false for NaN
    said = ", ".join(f"{error:.1e} in {str(dtype)[6:]}" for dtype, error in errors.items())
    verdict = "passed" if good else "failed"
    return f"{verdict}: y and five gradients, error at most {said}, of the largest value"


def _error(name: str, device: str, dtype: torch.dtype) -> float:
    M, K, N, R = _SELF_TEST_SHAPE
    generator = torch.Generator().manual_seed(0)
    sizes = ((M, K), (N, K), (N,), (K, R), (R, N))
    values = [(torch.randn(size, generator=generator) / K**0.5).to(dtype) for size in sizes]
    dy = torch.randn(M, N, generator=generator).to(dtype)
    exact = [t.double().requires_grad_() for t in values]
    ours = [t.to(device).requires_grad_() for t in values]
    x, weight, bias, A, B = exact
    y_exact = lora_ext.lora_linear(x, weight, bias, A, B, 2.0, backend="reference")
    x, weight, bias, A, B = ours
    y_ours = lora_ext.lora_linear(x, weight, bias, A, B, 2.0, backend=name)
    y_exact.backward(dy.double())
    y_ours.backward(dy.to(device))
    pairs = [(y_exact, y_ours)] + [(e.grad, o.grad) for e, o in zip(exact, ours, strict=True)]
    return max(_relative_error(e, o) for e, o in pairs)


def _relative_error(exact: torch.Tensor, got: torch.Tensor) -> float:
    return ((got.cpu().double() - exact).abs().max() / exact.abs().max()).item()


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
