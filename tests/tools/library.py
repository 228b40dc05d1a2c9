"""Build csrc as libraries that take the place of lora_ext._C, without optimisation."""

import shutil
import subprocess
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import include_paths

from tests.tools.switched import HEADER

BLOCKS = {  # of an instruction set: the source, and what it defines
    "baseline": ("cpu/blocks_baseline", "kBaselineBlocks"),
    "avx2": ("cpu/blocks_avx2", "kAvx2Blocks"),
    "avx512": ("cpu/blocks_avx512", "kAvx512Blocks"),
    "avx512_bf16": ("cpu/blocks_avx512_bf16", "kAvx512Bf16Blocks"),
}
OF_THE_CPU = sorted((Path(__file__).parents[2] / "csrc/cpu").glob("*.cpp"))
SOURCES = [
    *("call", "checks"),
    *(f"cpu/{path.stem}" for path in OF_THE_CPU if not path.stem.startswith("blocks_")),
]
TORCH_HEADERS = [
    "inductor/aoti_torch/c/shim.h",
    "inductor/aoti_torch/generated/c_shim_cpu.h",
    "stable/ops.h",
    "stable/tensor.h",
]


class Library(NamedTuple):
    """What one library is made of."""

    csrc: Path
    isa: str = ""  # the one whose kernels it has, a third of the time to compile; "" for all
    changed: dict[str, Path] = {}  # sources that come from another csrc


def build(
    folder: Path,
    libraries: dict[str, Library],
    flags: str = "",
    more: Path | None = None,
    bindings: Path | None = None,
) -> None:
    """Build folder/NAME.so for each library by one ninja run.

    `flags` are further ones, `more` is a file of C++ that comes before what torch has. `bindings`
    is bindings.cpp compiled in an earlier run, where no change is in what it includes: 5 s.
    """
    includes = " ".join(f"-isystem {path}" for path in include_paths())
    linked = f"-L{Path(torch.__file__).parent / 'lib'} -ltorch -ltorch_cpu -lc10"
    rules = [
        f"includes = {includes}",
        f"python = {sysconfig.get_path('include')}",
        "plain = -O0 -w -std=c++20 -fPIC -DTORCH_TARGET_VERSION=0x020b000000000000",
        f"flags = $plain {flags}",
        "rule precompile",
        "  command = c++ $flags $includes -x c++-header $in -o $out",
        "build torch.h.gch: precompile torch.h",
        "rule compile",
        "  command = c++ $flags $own -I$sources $includes -include ./torch.h -MMD -MF $out.d "
        "-c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        # pybind11 takes no PyTorch headers before it; with sanitizers it compiles for 20 s.
        "rule bind",
        "  command = c++ $plain -I$sources -isystem $python $includes "
        "'-DLORA_EXT_BUILT_CUDA=\"none\"' -c $in -o $out",
        "rule link",
        f"  command = c++ -shared $flags -Wl,-Bsymbolic $in -o $out {linked}",
    ]
    objects: dict[tuple[Path, Path, str], str] = {}

    def compiled(file: Path, csrc: Path, own: str = "") -> str:
        key = file, csrc, own
        if key not in objects:
            target = objects[key] = f"{len(objects)}-{file.stem}.o"
            rule = "bind" if file.stem == "bindings" else "compile"
            needs = "" if rule == "bind" else " | torch.h.gch"
            rules.append(f"build {target}: {rule} {file}{needs}")
            rules.extend([f"  sources = {csrc}", f"  own = {own}"])
        return objects[key]

    for name, library in libraries.items():
        parts = [] if more is None else [compiled(more, library.csrc)]
        kept = [source for isa, (source, _) in BLOCKS.items() if library.isa in ("", isa)]
        for source in [*SOURCES, *kept, "bindings"]:
            if source == "bindings" and bindings is not None and bindings.exists():
                parts.append(str(bindings))
                continue
            csrc = library.changed.get(source, library.csrc)
            own = choice_of(library.isa) if source == "cpu/isa" else ""
            parts.append(compiled(csrc / f"{source}.cpp", csrc, own))
        rules.append(f"build {name}.so: link {' '.join(parts)}")
    header = folder / "torch.h"
    if not header.exists():
        header.write_text("".join(f"#include <torch/csrc/{h}>\n" for h in TORCH_HEADERS) + HEADER)
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    built = subprocess.run(["ninja", "-k", "0", "-C", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout
    if bindings is not None and not bindings.exists():
        shutil.copy(next(folder.glob("*-bindings.o")), bindings)


def choice_of(isa: str) -> str:
    """Return the flags by which isa.cpp finds one instruction set's kernels under every name."""
    if not isa:
        return ""
    _, kernels = BLOCKS[isa]
    return " ".join(f"-D{other}={kernels}" for _, other in BLOCKS.values() if other != kernels)


def load(library: Path) -> None:
    """Load a library as lora_ext._C, which must not be there yet."""
    assert "lora_ext" not in sys.modules, "too late: lora_ext has loaded its own kernels"
    spec = spec_from_file_location("lora_ext._C", library)
    sys.modules["lora_ext._C"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
