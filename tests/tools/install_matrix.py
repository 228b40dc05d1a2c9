"""Try lora_ext where something is missing or odd: it imports, says what runs, and computes right.

    python -m tests.tools.install_matrix [--rows no_triton,no_home] [--torches torch==2.13.0]

Each row is a folder with a copy of the built package and an interpreter of its own. --torches makes
an environment for each, which downloads it; --build compiles the extension in a path with spaces.
What this machine can't be is acted out, and the row says so: a torch without CUDA by its version's
attribute, g++ 11 by a script that answers as it does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOBODY = 65534
CHECK = """
import sys, warnings
warnings.simplefilter("always")
# An editable install's finder would find the checkout's extension where the copy has none.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
{before}
import torch, lora_ext
from lora_ext.backends import cpp
assert lora_ext.__file__.startswith({folder!r}), lora_ext.__file__
for dtype in (torch.float32, torch.bfloat16):
    layer = lora_ext.LinearWithLoRA(torch.nn.Linear(96, 160, dtype=dtype), 8, 1.7)
    torch.nn.init.normal_(layer.lora.B)
    x = torch.randn(37, 96, dtype=dtype, requires_grad=True)
    double = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    named = dict(zip(["x", *(n for n, _ in layer.named_parameters())], double))
    want = torch.nn.functional.linear(named["x"], named["linear.weight"], named["linear.bias"])
    want = want + 1.7 * (named["x"] @ named["lora.A"] @ named["lora.B"])
    y = layer(x)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    exact = torch.autograd.grad(want, double, dy.double())
    for ours, right in zip([y, *grads], [want, *exact]):
        error = (ours.double() - right).norm() / right.norm()
        assert error < 3 * torch.finfo(dtype).eps, (dtype, error)
said = lora_ext.explain(layer, x).splitlines()[0]
print("torch", torch.__version__, "python", sys.version.split()[0] + ":", said)
print("cuda:", cpp.load_cuda() or "loaded")
"""
Row = Callable[[Path], str]


def place(folder: Path, extension: bool = True) -> Path:
    """Copy the package to a folder, which anyone may read."""
    skipped = shutil.ignore_patterns("__pycache__", *([] if extension else ["*.so"]))
    shutil.copytree(ROOT / "lora_ext", folder / "lora_ext", ignore=skipped)
    folder.chmod(0o755)
    return folder


def check(
    folder: Path,
    backend: str = "cpp",
    *,
    says: str = "",
    before: str = "",
    python: str = sys.executable,
    user: int | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Run the check with a folder's package; return what it printed, or raise."""
    code = CHECK.format(before=before, folder=str(folder))
    as_user = [] if user is None else ["setpriv", f"--reuid={user}", "--clear-groups"]
    command = [*as_user, python, "-c", code]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | (environment or {})
    ran = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    everything = ran.stdout + ran.stderr
    if ran.returncode != 0 or f"{backend}: runs" not in ran.stdout or says not in everything:
        raise AssertionError(f"expected {backend!r} to run and {says!r} in:\n{everything[-3000:]}")
    return ran.stdout.strip().replace("\n", ", ")


def setup(*arguments: str, folder: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Run setup.py; return its exit status and what it printed."""
    command = [sys.executable, "setup.py", "-q", *arguments]
    env = os.environ | environment
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def refused(said: tuple[int, str], message: str) -> str:
    """Return the line of a message with which setup.py has to end."""
    assert said[0] != 0 and message in said[1], f"expected {message!r} in:\n{said[1][-3000:]}"
    return [line for line in said[1].splitlines() if message in line][-1][:160]


def as_installed(folder: Path) -> str:
    return check(place(folder))


def no_extension(folder: Path) -> str:
    says = "pip install --no-build-isolation"
    return check(place(folder, extension=False), "reference", says=says)


def broken_extension(folder: Path) -> str:
    """One that does not load, as one of another torch without the stable ABI would."""
    for library in place(folder).glob("lora_ext/_C*.so"):
        library.write_bytes(b"\x7fELF of another machine")
    return check(folder, "reference", says="pip install --no-build-isolation")


def no_compiler(folder: Path) -> str:
    """The built extension needs none; building one says which is missing."""
    environment = {"PATH": str(folder), "LORA_EXT_BUILD": "cpu", "CXX": "no-such-compiler"}
    out = [f"--build-temp={folder}/temp", f"--build-lib={folder}/lib"]
    line = refused(setup("build_ext", *out, **environment), "no-such-compiler")
    return f"{check(place(folder), environment={'PATH': str(folder)})}, build: {line}"


def no_triton(folder: Path) -> str:
    (place(folder) / "triton.py").write_text("raise ImportError('no triton here')\n")
    return check(folder)


def cpu_only_torch(folder: Path) -> str:
    """Acted out."""
    before = "import torch; torch.version.cuda = None"
    return check(place(folder), before=before, says="is not built for CUDA")


def another_cuda(folder: Path) -> str:
    """Acted out."""
    before = "import torch; torch.version.cuda = '11.8'"
    return check(place(folder), before=before, says="is built for CUDA")


def old_compiler(folder: Path) -> str:
    """Acted out."""
    answer = "case $1 in --version) echo 'g++ (GCC) 11.4.0';; *) echo 11.4.0;; esac"
    (folder / "g++").write_text(f"#!/bin/sh\n{answer}\n")
    (folder / "g++").chmod(0o755)
    said = setup("build_ext", CXX=str(folder / "g++"), LORA_EXT_BUILD="cpu")
    return refused(said, "lora_ext needs g++ 12 or later")


def old_architecture(folder: Path) -> str:
    """What images that build torch name: older cards are left out, alone they end the build."""
    alone = setup("--version", TORCH_CUDA_ARCH_LIST="7.5", LORA_EXT_BUILD="cuda")
    code, said = setup("--version", TORCH_CUDA_ARCH_LIST="7.5 8.0", LORA_EXT_BUILD="auto")
    if "left out 7.5" not in said:  # without nvcc nothing is asked of the list
        assert code == 0 and "the CUDA kernels are not built" in said, said
        return refused(alone, "the CUDA kernels can't be built")
    return refused(alone, "which names none from 8.0 on") + ", with 8.0: left out 7.5"


def read_only_for_nobody(folder: Path) -> str:
    """No home, nothing to write to, another user than the owner where we may act as one."""
    place(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    user = NOBODY if os.geteuid() == 0 else None
    said = check(folder, user=user, environment={"HOME": "/nonexistent"})
    folder.chmod(0o755)
    return said + ("" if user else ", as the owner")


def odd_path(folder: Path) -> str:
    """Spaces and letters that are not ASCII."""
    odd = folder / "a folder of Zoë's, 模型"
    odd.mkdir()
    return check(place(odd))


def build_in_odd_path(folder: Path) -> str:
    """Compile there as well."""
    odd = folder / "a folder of Zoë's, 模型"
    for part in ("csrc", "lora_ext"):
        skipped = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / part, odd / part, ignore=skipped)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, odd)
    code, said = setup("build_ext", "--inplace", folder=odd, LORA_EXT_BUILD="cpu")
    assert code == 0, said[-3000:]
    return check(odd)


def with_torch(requirement: str) -> Row:
    """Return the row of another torch, in an environment of its own."""

    def row(folder: Path) -> str:
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv/bin/python")
        install = [python, "-m", "pip", "install", "-q", "--no-compile"]
        subprocess.run([*install, requirement, "numpy", "safetensors"], check=True)
        (folder / "site").mkdir()
        return check(place(folder / "site"), python=python)

    return row


ROWS: dict[str, Row] = {
    row.__name__: row
    for row in (
        *(as_installed, no_extension, broken_extension, no_compiler, no_triton, cpu_only_torch),
        *(another_cuda, old_compiler, old_architecture, read_only_for_nobody, odd_path),
    )
}


def main() -> None:
    """Run the rows, print a line for each, and exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--torches", nargs="*", default=[], help="requirements: torch==2.13.0")
    arguments = parser.parse_args()
    rows = {name: ROWS[name] for name in arguments.rows.split(",") if name}
    if arguments.build:
        rows["build_in_odd_path"] = build_in_odd_path
    rows |= {requirement: with_torch(requirement) for requirement in arguments.torches}
    failed = []
    for name, row in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{name}: {row(Path(folder))}", flush=True)
            except (AssertionError, subprocess.CalledProcessError) as error:
                print(f"{name}: FAILED: {error}", flush=True)
                failed.append(name)
    print(f"{len(rows) - len(failed)} of {len(rows)} rows are as expected", *failed)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
