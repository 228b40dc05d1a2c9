"""Make faults by rule, one at a time, and list those that no test catches.

    python -m tests.tools.mutants --parts files,call --count 40 --seed 0

works on a copy of the tree. A part is some sources and the tests that have to catch a fault in
them; C++ is compiled again for each. A survivor is printed with its line: either a test is missing,
or the line makes no difference, and then it can go.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """Sources and the tests that hold them."""

    sources: tuple[str, ...]  # globs
    tests: tuple[str, ...]
    build: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    seconds: int = 300


INTERPRETED = "tests/op/test_backends.py", "tests/op/test_dropout.py", "--backends=triton"
PARTS = {
    "files": Part(
        ("lora_ext/adapters*.py", "lora_ext/files.py", "lora_ext/patterns.py"), ("tests/files",)
    ),
    "call": Part(
        ("lora_ext/{functional,call,ops,bases,dropout,checks}.py", "lora_ext/backends/*.py"),
        ("tests/op", "--deselect=tests/op/test_mutants_cpp.py", "--deselect=tests/op/test_isa.py"),
    ),
    "layers": Part(
        ("lora_ext/{layers,inject,prepack,panels,explain}.py",), ("tests/layers", "tests/files")
    ),
    "cpp": Part(
        ("csrc/cpu/*.h", "csrc/cpu/*.cpp", "csrc/call.*", "csrc/checks.*"),
        ("tests/op/test_backends.py", "tests/op/test_backward.py", "tests/layers/test_prepack.py"),
        build=True,
    ),
    "triton": Part(
        ("lora_ext/backends/triton*/*.py",),
        INTERPRETED,
        environment=(("TRITON_INTERPRET", "1"),),
        seconds=900,
    ),
}


@dataclass(frozen=True)
class Fault:
    """One change of one file."""

    path: str
    start: int
    end: int
    new: str
    line: int

    def apply(self, text: str) -> str:
        """Return the file with the fault in it."""
        return text[: self.start] + self.new + text[self.end :]


COMPARE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARE |= {"is": "is not", "is not": "is", "in": "not in", "not in": "in"}
BINARY = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "&": "|", "|": "&"}
BINARY |= {"<<": ">>", ">>": "<<", "@": "*"}


def faults_in_python(path: str, text: str) -> Iterator[Fault]:
    """Yield other operators and bounds, conditions turned round, arguments swapped or left out."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    data = text.encode()

    def place(node: ast.AST, end: bool = False) -> int:
        row, column = (
            (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        )
        return len(data[: lines[row - 1] + column].decode())

    def fault(start: int, end: int, new: str) -> Fault:
        return Fault(path, start, end, new, text.count("\n", 0, start) + 1)

    def between(left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[Fault]:
        start, end = place(left, end=True), place(right)
        for old in sorted(table, key=len, reverse=True):
            found = re.search(rf"(?<![<>=!/*]){re.escape(old)}(?![<>=/*])", text[start:end])
            if found and not text[start:end].strip(f"() \\\n{old}"):
                yield fault(start + found.start(), start + found.end(), table[old])
                return

    tree = ast.parse(text)
    typed = [n.annotation for n in ast.walk(tree) if isinstance(n, (ast.arg, ast.AnnAssign))]
    typed += [n.returns for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    types = {n for annotation in typed if annotation is not None for n in ast.walk(annotation)}
    for node in ast.walk(tree):
        if node in types:
            continue
        match node:
            case ast.Compare(left=left, comparators=[right]):
                yield from between(left, right, COMPARE)
            case ast.BinOp(left=left, right=right):
                yield from between(left, right, BINARY)
            case ast.BoolOp(values=[left, right, *_]):
                yield from between(left, right, {"and": "or", "or": "and"})
            case ast.If(test=test) | ast.IfExp(test=test):
                start, end = place(test), place(test, end=True)
                yield fault(start, end, f"(not ({text[start:end]}))")
            case ast.Constant(value=int(value)) if not isinstance(value, bool) and value < 100:
                yield fault(place(node), place(node, end=True), f"({value + 1})")
            case ast.Call(args=[first, second, *_]) if not isinstance(first, ast.Starred):
                a, b = (text[place(n) : place(n, end=True)] for n in (first, second))
                middle = text[place(first, end=True) : place(second)]
                if a != b and not isinstance(second, ast.Starred):
                    yield fault(place(first), place(second, end=True), f"{b}{middle}{a}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "mask":  # a load or a store past the end
                    yield fault(place(keyword), place(keyword, end=True), "mask=None")


CPP_RULES = {  # in code, not in comments or preprocessor lines
    r" < ": " <= ",
    r" <= ": " < ",
    r" \+ ": " - ",
    r" - ": " + ",
    r" == ": " != ",
    r" && ": " || ",
    r"std::min": "std::max",
    r"std::max": "std::min",
    r"\+= ": "= ",
    r" \* (?=\w*(?:stride|ld|row))": " + ",
    r"\(!": "(",
    r"(?<=[ (\[{])0(?=[;,)\]}])": "1",
    r"(\w+), (\w+)(?=[,)])": r"\2, \1",
}


def faults_in_cpp(path: str, text: str) -> Iterator[Fault]:
    """Yield other operators, bounds and strides, and arguments swapped."""
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.split("//")[0]
        if not code.lstrip().startswith(("#", "template", "using", "static_assert", "*")):
            for old, new in CPP_RULES.items():
                for found in re.finditer(old, code):
                    changed = found.expand(new)
                    if changed != found[0]:
                        yield Fault(path, at + found.start(), at + found.end(), changed, number)
        at += len(line)


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


def run_tests(copy: Path, part: Part) -> str:
    """Return how a part's tests end in a copy of the tree: "passed", or what caught the fault."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    environment |= dict(part.environment)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider"]
    try:
        if part.build:
            subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                cwd=copy,
                env=environment | {"LORA_EXT_BUILD": "cpu"},
                capture_output=True,
                timeout=600,
                check=True,
            )
        result = subprocess.run(
            [*command, *part.tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=part.seconds,
        )
    except subprocess.TimeoutExpired:
        return "took too long"
    except subprocess.CalledProcessError:
        return "does not compile"
    if result.returncode == 0:
        return "passed"
    caught = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    return caught[1] if caught else f"exit {result.returncode}"


def copy_of_the_tree(folder: str) -> Path:
    """Copy what git tracks, and what is built."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("lora_ext/*.so")]
    for name in [*names.stdout.split("\n"), *built]:
        if name and (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
    return Path(folder)


def main() -> None:
    """Try faults, and exit with 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--count", type=int, default=40, help="faults of each part")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    survivors, tried = [], 0
    for name in arguments.parts.split(","):
        part = PARTS[name]
        every = faults_of(part)
        chosen = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
        with tempfile.TemporaryDirectory() as folder:
            copy = copy_of_the_tree(folder)
            if (without := run_tests(copy, part)) != "passed":
                raise SystemExit(f"{name}: the tests fail without a fault: {without}")
            for fault in sorted(chosen, key=lambda f: (f.path, f.start)):
                text = (copy / fault.path).read_text()
                (copy / fault.path).write_text(fault.apply(text))
                start = time.monotonic()
                caught = run_tests(copy, part)
                (copy / fault.path).write_text(text)
                tried += caught != "does not compile"
                what = f"{fault.path}:{fault.line}: {text[fault.start : fault.end]!r}"
                line = f"{what} -> {fault.new!r}: {caught}, {time.monotonic() - start:.0f} s"
                print(line, flush=True)
                if caught == "passed":
                    survivors.append(line)
        print(f"{name}: {len(chosen)} of {len(every)} possible faults tried", flush=True)
    print(f"{tried} faults, {len(survivors)} survive", *survivors, sep="\n  ")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
