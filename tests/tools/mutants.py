"""Make faults by rule, one at a time, and list those that no test catches.

    python -m tests.tools.mutants --parts files,call --count 40 --seed 0

works on a copy of the tree. A part is some sources and the tests that have to catch a fault in
them. They run once without a fault, which shows what each of them reaches (reached.py). Then each
fault gets a fork of this process, which has torch imported, and in it the tests that reach it, the
quickest first, as many as --seconds allow; those of C++ are all in one library, each behind a
switch (switched.py). What none of these catches meets the checks of op/test_mutants_cpp.py where it
is C++, else all tests of its part if those are quick. A survivor is printed with its line: either a
test is missing, or the line makes no difference, and then it can go. --at call.cpp:120,route tries
the faults of some lines and files alone.
"""

import argparse
import contextlib
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tests.tools.faults import Fault, lines_of
from tests.tools.library import Library, build, load
from tests.tools.mutated import PARTS, ROOT, Part, faults_of
from tests.tools.reached import Chosen, Place, Reached, Recorder, RecorderOfFaults
from tests.tools.switched import MOST_FAULTS, smallest, switched

PRELOADED = ("torch", "numpy", "pytest", "hypothesis.stateful", "safetensors.torch")
ROUNDS = 6  # builds until the compiler takes every switch


def in_a_fork(action: Callable[[], int], seconds: int, log: Path) -> str:
    """Run a function in a fork; return how that ends: "passed", or what ended it.

    The limit is on processor time, so that a busy machine catches nothing.
    """
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = action()
            sys.stdout.flush()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            code = 99
        os._exit(code)
    end = time.monotonic() + 10 * seconds
    while (status := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)
    if os.WIFSIGNALED(status[1]):
        number = os.WTERMSIG(status[1])
        slow = number in (signal.SIGXCPU, signal.SIGKILL)
        return "took too long" if slow else f"ended by signal {number}"
    code = os.waitstatus_to_exitcode(status[1])
    caught = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return "passed" if code == 0 else caught[1] if caught else f"exit {code}"


def run_tests(
    copy: Path,
    part: Part,
    library: Path | None = None,
    fault: int = 0,
    chosen: list[str] | None = None,
    record: bool = False,
) -> str:
    """Return how a part's tests end in a copy of the tree, with one fault of a library on.

    All of them, or those that are chosen, or all with a record of what they reach. None chosen is
    the checks of test_mutants_cpp.py.
    """

    def tests() -> int:
        os.environ.update({"OMP_NUM_THREADS": "1", "LORA_EXT_FAULT": str(fault)})
        os.environ.update(dict(part.environment))
        os.chdir(copy)
        sys.dont_write_bytecode = True
        recorder = None
        if record:
            files = {str(copy / fault.path) for fault in faults_of(part)}
            recorder = Recorder(files) if library is None else RecorderOfFaults(library)
        for name in [n for n in sys.modules if n.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        if library is not None:
            load(library)
        if chosen == []:  # the checks that each of MUTANTS has to fail
            from tests.op.test_mutants_cpp import why_refused

            why = why_refused()
            print(f"FAILED tests/op/test_mutants_cpp.py: {why}" if why else "")
            return int(why is not None)
        import pytest

        options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
        options += part.tests if chosen is None else files_of(chosen)
        options += [option for option in part.tests if option.startswith("-") and chosen]
        if recorder is not None:
            recorder.start()
        plugins = [p for p in (recorder, chosen and Chosen(chosen)) if p]
        code = int(pytest.main(options, plugins))
        if recorder is not None:
            sys.settrace(None)
            (copy / "reached").write_bytes(pickle.dumps(vars(recorder.reached)))
        return code

    return in_a_fork(tests, part.seconds, copy / "log.txt")


def files_of(tests: list[str]) -> list[str]:
    """Return the files that some tests are in."""
    return list(dict.fromkeys(test.partition("::")[0] for test in tests))


def copy_of_the_tree(folder: str) -> Path:
    """Copy what git tracks, and what is built."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("lora_ext/*.so")]
    for name in [*names.stdout.split("\n"), *built]:
        if name and (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
    return Path(folder)


def library_of(copy: Path, chosen: list[Fault]) -> tuple[Path, list[Fault]]:
    """Build a library with every fault that compiles behind its switch; return both.

    The number of a fault is its place in the list, from 1.
    """
    kept = list(enumerate(chosen, 1))
    for _ in range(ROUNDS):
        for path in {fault.path for fault in chosen}:
            text = (ROOT / path).read_text()
            here = [
                smallest(text, f.start, f.end, f.new, number)
                for number, f in kept
                if f.path == path
            ]
            if (new := switched(text, here)) != (copy / path).read_text():  # as ninja sees it
                (copy / path).write_text(new)
        try:
            build(copy, {"switched": Library(copy / "csrc")})
        except AssertionError as error:
            left = [(number, f) for number, f in kept if number not in blamed(str(error))]
            if left == kept:
                raise
            kept = left
        else:
            break
    else:
        raise SystemExit("the faults do not compile")
    return copy / "switched.so", [fault for _, fault in kept]


def blamed(output: str) -> set[int]:
    """Return the number of the fault next to each place that the compiler refuses.

    The last before it on its line, or the first after it there, or the last on a line above.
    """
    bad: set[int] = set()
    for path, line, column in re.findall(r"^(\S+?):(\d+):(\d+): error", output, re.MULTILINE):
        *above, here = Path(path).read_bytes().splitlines()[: int(line)]
        faults = [(m.start(), m[1]) for m in re.finditer(rb"lora_ext_fault\((\d+)\)", here)]
        before = [number for start, number in faults if start < int(column)]
        earlier = re.findall(rb"lora_ext_fault\((\d+)\)", b"".join(above))
        bad |= {int(n) for n in (before[-1:] or [n for _, n in faults[:1]] or earlier[-1:])}
    return bad


def try_part(name: str, part: Part, chosen: list[Fault], seconds: float) -> tuple[int, list[str]]:
    """Try faults; return how many there were that compile, and a line for each survivor."""
    survivors, texts = [], {f.path: (ROOT / f.path).read_text() for f in chosen}
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_tree(folder).resolve()
        numbers, library, kept = {f: i for i, f in enumerate(chosen, 1)}, None, chosen
        if name == "cpp":
            library, kept = library_of(copy, chosen)
        if (without := run_tests(copy, part, library, record=True)) != "passed":
            print((copy / "log.txt").read_text())
            raise SystemExit(f"{name}: the tests fail without a fault: {without}")
        reached = Reached(**pickle.loads((copy / "reached").read_bytes()))
        for fault in kept:
            text, start = texts[fault.path], time.monotonic()
            places: set[Place] = {("", numbers[fault])}
            if library is None:
                places = {(str(copy / fault.path), line) for line in lines_of(text, fault)}
                (copy / fault.path).write_text(fault.apply(text))
            tests = reached.tests_of(places)
            chosen_ones = reached.within(tests, seconds)
            turns = [chosen_ones] if tests else []
            turns += [[]] if library is not None else [None] if part.again else []
            caught = "passed"
            for turn in turns:
                if caught == "passed":
                    caught = run_tests(copy, part, library, numbers[fault], turn)
            if library is None:
                (copy / fault.path).write_text(text)
            what = f"{fault.path}:{fault.line}: {text[fault.start : fault.end]!r}"
            line = f"{what} -> {fault.new!r}: {caught}, {len(chosen_ones)} of {len(tests)} tests"
            print(f"{line}, {time.monotonic() - start:.0f} s", flush=True)
            if caught == "passed":
                survivors.append(line)
    return len(kept), survivors


def is_at(fault: Fault, places: list[str]) -> bool:
    """Whether one of some places, "route.cpp:12" or "route", is that of a fault."""
    return any(p in fault.path or f"{fault.path}:{fault.line}".endswith(p) for p in places)


def main() -> None:
    """Try faults, and exit with 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--count", type=int, default=40, help="faults of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of tests without a fault")
    parser.add_argument("--at", type=lambda text: text.split(","), help="of these lines, files")
    arguments = parser.parse_args()
    survivors, tried = [], 0
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    for name in [name for name in PARTS if name in arguments.parts.split(",")]:
        for module in (*PRELOADED, *PARTS[name].preloaded):
            with contextlib.suppress(ImportError):
                import_module(module)
        every = faults_of(PARTS[name])
        if arguments.at is not None:
            every = [fault for fault in every if is_at(fault, arguments.at)]
        count = min(arguments.count, len(every), MOST_FAULTS - 1)
        chosen = random.Random(arguments.seed).sample(every, count)
        count, left = try_part(
            name, PARTS[name], sorted(chosen, key=lambda f: (f.path, f.start)), arguments.seconds
        )
        print(f"{name}: {count} of {len(every)} possible faults, {len(left)} survive", flush=True)
        tried, survivors = tried + count, survivors + left
    print(f"{tried} faults, {len(survivors)} survive", *survivors, sep="\n  ")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
