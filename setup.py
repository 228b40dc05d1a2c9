"""Build the extension modules; everything else is in pyproject.toml.

LORA_EXT_BUILD=auto (default) builds lora_ext._C, the CPU kernels, and lora_ext._cuda where torch is
a CUDA build, a toolkit of the same major version is there and compiles it; cpu builds _C alone;
cuda demands both; none makes a pure-Python package. TORCH_CUDA_ARCH_LIST names the compute
capabilities, CXX the compiler.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

# 2.11, the oldest torch whose stable ABI has all that csrc calls: one binary serves it and later.
TORCH_TARGET_VERSION = "0x020b000000000000"
CHOICES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
OLDEST_ARCHITECTURE = 80  # cp.async and the bfloat16 matrix instruction
OLDEST_GCC = 12  # __builtin_shufflevector, _Float16 in C++, __builtin_cpu_supports("avx512fp16")
# No -march: each kernel file names the instruction set it is compiled for.
CXX_FLAGS = "-O3 -g0 -std=c++20 -Wall -fvisibility=hidden -ffp-contract=fast".split()
CXX_FLAGS += ["-fno-math-errno"]
CUDA_LIBRARY = "lora_ext._cuda"
BUILT_CUDA = "LORA_EXT_BUILT_CUDA"  # the macro by which lora_ext._C tells what _cuda was built with
SHARED = ["csrc/call.cpp", "csrc/checks.cpp"]  # by both extensions


def build_arguments() -> dict:
    """Return setup()'s arguments for what LORA_EXT_BUILD asks for."""
    choice = os.environ.get("LORA_EXT_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"LORA_EXT_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        print("lora_ext: LORA_EXT_BUILD=none, the C++ kernels are not built")
        return {}
    check_compiler()
    nvcc, why_not = (None, "LORA_EXT_BUILD=cpu") if choice == "cpu" else find_nvcc()
    capabilities, ptx = architectures(nvcc) if nvcc is not None else ([], False)
    if nvcc is not None and not capabilities:
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        nvcc, why_not = None, f"TORCH_CUDA_ARCH_LIST is {asked!r}, which names none from 8.0 on"
    if nvcc is None:
        if choice == "cuda":
            raise SystemExit(f"LORA_EXT_BUILD=cuda, but the CUDA kernels can't be built: {why_not}")
        print(f"lora_ext: the CUDA kernels are not built: {why_not}")
        return {"ext_modules": [cpu_extension("none")], "cmdclass": {"build_ext": builder()}}
    names = " ".join(f"{c // 10}.{c % 10}" for c in capabilities) + " and PTX" * ptx
    print(f"lora_ext: building the CUDA kernels by {nvcc} for {names}")
    extensions = [cpu_extension(f"{release(nvcc)} for {names}"), cuda_extension(nvcc)]
    kernels = functools.partial(compile_kernels, nvcc, capabilities, ptx)
    build_ext = builder(kernels, required=choice == "cuda")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build_ext}}


def builder(kernels: Callable[[Path], Path] | None = None, required: bool = False) -> type:
    """Return the command build_ext; kernels(folder) makes the object file of the CUDA kernels.

    Where that fails, and unless they are required, the CPU's are built alone.
    """
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildExtensions(BuildExtension):
        failed: set[str] = set()

        def finalize_options(self) -> None:
            # pip would take a new folder each time, and a wheel compile what an install has.
            if self.build_temp is None:
                python = sys.implementation.cache_tag
                self.build_temp = f"build/temp-torch-{torch.__version__}-{python}"
            super().finalize_options()

        def build_extensions(self) -> None:
            # _cuda before _C, which tells whether there is one.
            self.extensions.sort(key=lambda ext: ext.name != CUDA_LIBRARY)
            super().build_extensions()
            self.extensions[:] = [ext for ext in self.extensions if ext.name not in self.failed]

        def build_extension(self, ext: Extension) -> None:
            # A folder each: both compile SHARED, with macros of their own.
            of_all, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"
            try:
                if ext.name == CUDA_LIBRARY:
                    ext.extra_objects = [str(kernels(Path(self.build_temp).resolve()))]
                super().build_extension(ext)
            except Exception as error:  # nvcc's, the C++ compiler's, ninja's or the linker's
                if required or ext.name != CUDA_LIBRARY:
                    raise
                print(f"lora_ext: the CUDA kernels are not built: {error}", flush=True)
                self.failed.add(ext.name)
                for other in self.extensions:
                    kept = [macro for macro in other.define_macros if macro[0] != BUILT_CUDA]
                    other.define_macros = [*kept, (BUILT_CUDA, '"none"')]
            finally:
                self.build_temp = of_all

    return BuildExtensions


def cpu_extension(cuda: str) -> Extension:
    """Return lora_ext._C, which tells with what CUDA the other one was built."""
    macros = [(BUILT_CUDA, f'"{cuda}"')]
    return extension("lora_ext._C", [*find("*.cpp"), *find("cpu/*.cpp")], macros)


def cuda_extension(nvcc: str) -> Extension:
    """Return lora_ext._cuda, a library that registers operators; the CUDA runtime is inside it."""
    result = extension(CUDA_LIBRARY, [*SHARED, *find("cuda/*.cpp")])
    result.define_macros.append(("USE_CUDA", None))  # torch's headers then declare its streams
    # Nothing of torch's Python, and no other copy of the runtime.
    result.libraries = ["c10", "torch", "torch_cpu", "torch_cuda", "cudart_static", "dl", "rt"]
    result.library_dirs.append(runtime_folder(nvcc))
    result.extra_link_args = ["-Wl,--exclude-libs,libcudart_static.a"]
    return result


def extension(name: str, sources: list[str], macros: list[tuple[str, str]] = ()) -> Extension:
    """Return an extension on torch's stable ABI."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        name,
        sources,
        depends=[*find("**/*.h"), *find("cuda/*.cu")],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), *macros],
        extra_compile_args=CXX_FLAGS,
    )


def find(pattern: str) -> list[str]:
    """Return the files of csrc that match, in a fixed order."""
    return sorted(map(str, Path("csrc").glob(pattern)))


def check_compiler() -> None:
    """End the build with a clear message where the C++ compiler is a g++ that is too old."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    try:
        ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        if "clang" in ask([*command, "--version"]).stdout.lower():
            return
        version = ask([*command, "-dumpfullversion"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return  # the build names what it misses
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) < OLDEST_GCC:
        raise SystemExit(
            f"lora_ext needs g++ {OLDEST_GCC} or later, {' '.join(command)} is {version}: install "
            f"it and set CXX=g++-{OLDEST_GCC}, or set LORA_EXT_BUILD=none for plain PyTorch"
        )


def find_nvcc() -> tuple[str | None, str]:
    """Return (the path of nvcc, "") or (None, why the CUDA kernels can't be built). Asks no GPU."""
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not built for CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        nvcc = shutil.which("nvcc", path=f"{home}/bin")
        if nvcc is None:
            return None, f"CUDA_HOME is {home} and has no bin/nvcc"
    else:
        package = find_spec("nvidia")  # pip install nvidia-cuda-nvcc
        places = package.submodule_search_locations if package is not None else []
        packaged = [str(path) for place in places for path in Path(place).glob("*/bin/nvcc")]
        nvcc = shutil.which("nvcc") or next(iter(sorted(packaged)), None)
        nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            return None, "no nvcc is found; set CUDA_HOME, or pip install nvidia-cuda-nvcc"
    if release(nvcc).split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"{nvcc} is of CUDA {release(nvcc)}, torch is built for {torch.version.cuda}"
    if runtime_folder(nvcc) is None:
        return None, f"{nvcc} has no libcudart_static.a; pip install nvidia-cuda-runtime"
    return nvcc, ""


def runtime_folder(nvcc: str) -> str | None:
    """Return where the static CUDA runtime lies: as nvcc says, or as its packages have it."""
    command = [nvcc, "--dryrun", "-x", "cu", "-"]
    said = subprocess.run(command, input="", capture_output=True, text=True, check=True).stderr
    line = next((line for line in said.splitlines() if "LIBRARIES=" in line), "")
    places = [*re.findall(r'"-L([^"]+)"', line), str(Path(nvcc).parents[1] / "lib")]
    return next((p for p in places if Path(p, "libcudart_static.a").is_file()), None)


def release(nvcc: str) -> str:
    """Return nvcc's CUDA version, such as 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def architectures(nvcc: str) -> tuple[list[int], bool]:
    """Return the compute capabilities to compile for, 80 for 8.0, and whether to add PTX.

    TORCH_CUDA_ARCH_LIST is taken, but for what is too old, which images that build torch name too;
    the default is cut to what this nvcc knows.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    capabilities, ptx, too_old = [], False, []
    for name in asked or ARCHITECTURES.split():
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if number is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST must have compute capabilities, as in {ARCHITECTURES!r}, "
                f"got {name!r}"
            )
        capability = int(number[1] + number[2])
        if capability < OLDEST_ARCHITECTURE:
            too_old.append(name)
            continue
        capabilities.append(capability)
        ptx |= number[3] is not None
    if too_old:
        print(f"lora_ext: the CUDA kernels need 8.0 or later: left out {' '.join(too_old)}")
    if not asked:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        capabilities = [c for c in capabilities if f"sm_{c}" in listed.stdout.split()]
        if not capabilities:
            raise SystemExit(f"{nvcc} knows none of {ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
    return capabilities, ptx


def compile_kernels(nvcc: str, capabilities: list[int], ptx: bool, folder: Path) -> Path:
    """Compile csrc/cuda/kernels.cu and return the object file.

    One PTX serves all: nothing in the kernels is newer than its capability, and to make it once
    saves 6 s an architecture. With `ptx` it is kept, for cards yet to come.
    """
    sources = [Path(p) for p in (*find("cuda/*.cu"), *find("cuda/*.h"), "setup.py")]
    lowest = min(capabilities)
    code = [*(f"sm_{c}" for c in capabilities), *[f"compute_{lowest}"] * ptx]
    name = "-".join(["kernels", *map(str, capabilities), *["ptx"] * ptx])
    target = folder / f"{name}.o"
    if target.exists() and all(s.stat().st_mtime < target.stat().st_mtime for s in sources):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC", "--threads", "0"]
    command += [f"--gpu-architecture=compute_{lowest}", f"--gpu-code={','.join(code)}"]
    command += ["-Xfatbin", "-compress-all", "-c", "csrc/cuda/kernels.cu", "-o"]
    print(" ".join(command), target, flush=True)
    partial = target.with_suffix(".partial.o")  # an interrupted build leaves no object behind
    subprocess.run([*command, str(partial)], check=True)
    return partial.rename(target)


if __name__ == "__main__":
    # pip's ninja is next to this Python, whether its environment is activated or not.
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    setup(**build_arguments())
