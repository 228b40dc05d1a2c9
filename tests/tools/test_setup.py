"""What setup.py builds: LORA_EXT_BUILD, where nvcc is looked for, the list of architectures."""

import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension

ROOT = Path(__file__).parents[2]
CUDA = torch.version.cuda or "13.0"
WHICH = shutil.which
NVCC = """#!/bin/sh
case $1 in
  --version) echo 'Cuda compilation tools, release {release}, V1' ;;
  --list-gpu-code) printf 'sm_80\\nsm_90\\nsm_121\\n' ;;
  --dryrun) echo '#$ LIBRARIES=  "-L{folder}/of/toolkit"' >&2 ;;
esac
"""


@pytest.fixture
def setup(monkeypatch):
    """Import setup.py, with no variable set, no nvcc on the PATH and a torch built for CUDA."""
    for name in ("LORA_EXT_BUILD", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", CUDA)
    spec = spec_from_file_location("lora_ext_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "which", which_only_under("/nowhere"))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.chdir(ROOT)
    return module


def which_only_under(folder: object):
    """Return a shutil.which that finds nothing outside a folder."""

    def find(name: str, path: str | None = None) -> str | None:
        found = WHICH(name, path=path)
        return found if found is not None and found.startswith(str(folder)) else None

    return find


def make_nvcc(folder: Path, release: str = CUDA, library: str = "lib") -> Path:
    """Write an nvcc that answers what setup.py asks, and the runtime library next to it."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release, folder=folder))
    nvcc.chmod(0o755)
    if library:
        (folder / library).mkdir(parents=True)
        (folder / library / "libcudart_static.a").touch()
    return nvcc


def test_unknown_choice_is_refused(setup, monkeypatch):
    monkeypatch.setenv("LORA_EXT_BUILD", "gpu")
    with pytest.raises(SystemExit, match="must be one of auto, cpu, cuda, none, got 'gpu'"):
        setup.build_arguments()


def test_none_builds_nothing_and_says_so(setup, monkeypatch, capsys):
    monkeypatch.setenv("LORA_EXT_BUILD", "none")
    assert setup.build_arguments() == {}
    assert capsys.readouterr().out == (
        "lora_ext: LORA_EXT_BUILD=none, the C++ kernels are not built\n"
    )


@pytest.mark.parametrize(
    ("choice", "why"), [("cpu", "LORA_EXT_BUILD=cpu"), ("auto", "no nvcc is found; set CUDA_HOME")]
)
def test_without_cuda_the_cpu_kernels_are_built_and_one_line_says_why(
    setup, monkeypatch, capsys, choice, why
):
    monkeypatch.setenv("LORA_EXT_BUILD", choice)
    (module,) = setup.build_arguments()["ext_modules"]
    assert module.name == "lora_ext._C" and ("LORA_EXT_BUILT_CUDA", '"none"') in (
        module.define_macros
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"lora_ext: the CUDA kernels are not built: {why}")


def test_cuda_that_cannot_be_built_is_an_error(setup, monkeypatch):
    monkeypatch.setenv("LORA_EXT_BUILD", "cuda")
    with pytest.raises(SystemExit, match="LORA_EXT_BUILD=cuda, but .* no nvcc is found"):
        setup.build_arguments()


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_with_a_toolkit_both_are_built(setup, monkeypatch, capsys, tmp_path, choice):
    nvcc = make_nvcc(tmp_path)
    monkeypatch.setattr(setup.shutil, "which", which_only_under(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LORA_EXT_BUILD", choice)
    cpu, cuda = setup.build_arguments()["ext_modules"]
    assert ("LORA_EXT_BUILT_CUDA", f'"{CUDA} for 8.0 9.0 and PTX"') in cpu.define_macros
    assert cuda.name == "lora_ext._cuda" and "cudart_static" in cuda.libraries
    assert str(tmp_path / "lib") in cuda.library_dirs
    assert f"building the CUDA kernels by {nvcc} for 8.0 9.0 and PTX" in capsys.readouterr().out


def test_nvcc_of_cuda_home_then_of_the_path_then_of_a_package(setup, monkeypatch, tmp_path):
    home, path, package = (make_nvcc(tmp_path / n) for n in ("home", "path", "nvidia/cu13"))
    monkeypatch.setattr(setup.shutil, "which", which_only_under(tmp_path))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(setup, "find_spec", lambda name: found if name == "nvidia" else None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup.find_nvcc() == (str(package), "")
    monkeypatch.setenv("PATH", str(path.parent))
    assert setup.find_nvcc() == (str(path), "")
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    assert setup.find_nvcc() == (str(home), "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # named, so nothing else is taken instead
    assert setup.find_nvcc() == (None, f"CUDA_HOME is {tmp_path} and has no bin/nvcc")


@pytest.mark.parametrize(
    ("nvcc", "why"),
    [
        ({"release": "9.2"}, f"is of CUDA 9.2, torch is built for {CUDA}"),
        ({"library": ""}, "has no libcudart_static.a; pip install nvidia-cuda-runtime"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_left_alone(setup, monkeypatch, tmp_path, nvcc, why):
    make_nvcc(tmp_path, **nvcc)
    monkeypatch.setattr(setup.shutil, "which", which_only_under(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found, reason = setup.find_nvcc()
    assert found is None and reason.endswith(why)


def test_the_toolkits_own_folder_of_the_runtime_is_taken(setup, tmp_path):
    nvcc = make_nvcc(tmp_path, library="of/toolkit")
    assert setup.runtime_folder(str(nvcc)) == str(tmp_path / "of/toolkit")


def test_torch_for_the_cpu_builds_no_cuda(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup.find_nvcc() == (None, f"torch {torch.__version__} is not built for CUDA")


def test_default_architectures_are_cut_to_what_nvcc_knows(setup, tmp_path):
    assert setup.architectures(str(make_nvcc(tmp_path))) == ([80, 90], True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("9.0", ([90], False)),
        ("8.0;8.6+PTX", ([80, 86], True)),
        ("9.0a 10.0f 12.1", ([90, 100, 121], False)),
    ],
)
def test_architectures_asked_for_are_taken_as_they_are(setup, monkeypatch, asked, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup.architectures("no nvcc is asked") == expected


@pytest.mark.parametrize("asked", ["Hopper", "9", "8.0,8.6"])
def test_an_architecture_that_cannot_be_is_named(setup, monkeypatch, asked):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {asked}")
    with pytest.raises(SystemExit, match=f"must have compute capabilities.* got '{asked}'"):
        setup.architectures("no nvcc is asked")


def test_an_architecture_that_is_too_old_is_left_out(setup, monkeypatch, capsys):
    """As in the list of the images that torch is built in."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5+PTX 8.0 8.6 9.0 12.0+PTX")
    assert setup.architectures("no nvcc is asked") == ([80, 86, 90, 120], True)
    said = capsys.readouterr().out
    assert said == "lora_ext: the CUDA kernels need 8.0 or later: left out 7.0 7.5+PTX\n"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX 8.0")
    assert setup.architectures("no nvcc is asked") == ([80], False)


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_architectures_that_are_all_too_old_leave_the_cpu_kernels(
    setup, monkeypatch, capsys, tmp_path, choice
):
    make_nvcc(tmp_path)
    monkeypatch.setattr(setup.shutil, "which", which_only_under(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LORA_EXT_BUILD", choice)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    if choice == "cuda":
        with pytest.raises(
            SystemExit, match="can't be built: TORCH_CUDA_ARCH_LIST is '7.5', which"
        ):
            setup.build_arguments()
        return
    (module,) = setup.build_arguments()["ext_modules"]
    assert module.name == "lora_ext._C"
    assert "not built: TORCH_CUDA_ARCH_LIST is '7.5', which names none" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["auto", "cuda"])
@pytest.mark.parametrize("fault", ["nvcc", "c++"])
def test_a_failing_cuda_compile_leaves_the_cpu_kernels(
    setup, monkeypatch, capsys, tmp_path, choice, fault
):
    """Found in the midst of the build: under auto it goes on, and _C tells that there are none."""
    nvcc = make_nvcc(tmp_path)
    ends = "exit 3" if fault == "nvcc" else "for last; do :; done; touch $last"
    nvcc.write_text(
        NVCC.replace("esac", f"  *) {ends} ;;\nesac").format(release=CUDA, folder=tmp_path)
    )
    monkeypatch.setattr(setup.shutil, "which", which_only_under(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LORA_EXT_BUILD", choice)
    built = []

    def compile_one(self, ext):
        if ext.name == "lora_ext._cuda":
            raise RuntimeError("Error compiling objects for extension")
        built.append((ext.name, dict(ext.define_macros)["LORA_EXT_BUILT_CUDA"]))

    def compile_all(self):
        for ext in self.extensions:
            self.build_extension(ext)

    monkeypatch.setattr(BuildExtension, "build_extension", compile_one)
    monkeypatch.setattr(BuildExtension, "build_extensions", compile_all)
    command = setup.build_arguments()
    distribution = Distribution(command)
    build = command["cmdclass"]["build_ext"](distribution, use_ninja=False)
    build.build_temp = str(tmp_path / "build")
    build.ensure_finalized()
    why = {
        "nvcc": (subprocess.CalledProcessError, "returned non-zero exit status 3."),
        "c++": (RuntimeError, "Error compiling objects for extension"),
    }[fault]
    if choice == "cuda":
        with pytest.raises(why[0]):
            build.build_extensions()
        assert not built
        return
    build.build_extensions()
    assert built == [("lora_ext._C", '"none"')]
    assert [ext.name for ext in build.extensions] == ["lora_ext._C"]
    assert distribution.ext_modules is build.extensions
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("lora_ext: the CUDA kernels are not built: ") and said.endswith(why[1])


def make_compiler(folder: Path, says: str, version: str) -> str:
    """Write a compiler that answers --version and -dumpfullversion."""
    compiler = folder / "g++"
    compiler.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo '{says}';; *) echo {version};; esac\n"
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_an_old_compiler_is_named_with_the_one_that_is_needed(setup, monkeypatch, tmp_path):
    old = make_compiler(tmp_path, "g++ (Debian 11.3.0-12) 11.3.0", "11.3.0")
    monkeypatch.setenv("CXX", old)
    monkeypatch.setenv("LORA_EXT_BUILD", "cpu")
    with pytest.raises(SystemExit, match=r"needs g\+\+ 12 or later, .* is 11.3.0: .*CXX=g\+\+-12"):
        setup.build_arguments()
    monkeypatch.setenv("LORA_EXT_BUILD", "none")
    assert setup.build_arguments() == {}


@pytest.mark.parametrize(
    ("says", "version"),
    [("g++ (GCC) 12.2.0", "12.2.0"), ("clang version 11.0.0", "11"), ("cc", "no number")],
)
def test_a_compiler_that_may_do_is_taken(setup, monkeypatch, tmp_path, says, version):
    monkeypatch.setenv("CXX", "env " + make_compiler(tmp_path, says, version))
    setup.check_compiler()


@pytest.mark.slow
def test_a_failing_build_is_an_error(tmp_path):
    """And not a package without its kernels."""
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-t", str(tmp_path), "-b", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"LORA_EXT_BUILD": "cpu", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "no-such-compiler" in result.stderr
