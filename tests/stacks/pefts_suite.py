"""PEFT's own tests with `accelerate` on everywhere: none may fail that passes without it.

    python -m tests.stacks.pefts_suite            some minutes: LoRA and DoRA, no model to download
    python -m tests.stacks.pefts_suite --whole    the LoRA part of PEFT's tests of layers, an hour
    python -m tests.stacks.pefts_suite --files test_decoder_models.py --only lora --online

The tests are those of the installed PEFT's source distribution, which pip downloads. Each run is in
a process of its own, once as PEFT is and once with this module as a plugin, which calls
`accelerate` after each adapter that PEFT injects. Tests that need a GPU skip themselves; without
--online those that need a model of the hub fail in both runs and count as such.
"""

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import tarfile
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
ON = "LORA_EXT_PEFTS_SUITE"  # "accelerate" or "groups": what the plugin does
# Of layers of each kind: forward and training, merging, several adapters at once, save and load.
SHORT = (
    "(lora or dora) and not (adalora or randlora or vblora or dtype_autocast or fsdp) and "
    "(TestMultipleActiveAdapters or TestMixedAdapterBatches or TestRequiresGrad or MLP and "
    "(forward or training or merge_layers or disable_adapters or roundtrip or only_params))"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests twice; return 1 if one fails with `accelerate` alone."""
    args = _parse(argv)
    folder = args.folder / f"peft-{version('peft')}"
    if not (folder / "pefts_tests").exists():
        unpack(download(args.folder), folder)
    files = [f"pefts_tests/{name}" for name in args.files]
    found = {}
    for how in ("", args.how):
        print(f"{'with ' + how if how else 'as PEFT is'}:", flush=True)
        found[how] = run(folder, files, args.only, how, args.online, args.processes)
        print("  " + ", ".join(f"{n} {what}" for what, n in Counter(found[how].values()).items()))
    plain, ours = found[""], found[args.how]
    broken = [name for name, what in plain.items() if what == "passed" != ours.get(name)]
    gained = [name for name, what in ours.items() if what == "passed" != plain.get(name)]
    print(f"{len(broken)} fail with {args.how} alone, {len(gained)} without it alone")
    for name in broken:
        print(f"  {name}: {ours.get(name, 'not run')}")
    if not any(what == "passed" for what in plain.values()):
        print("no test passed as PEFT is: nothing is shown")
        return 1
    return int(bool(broken))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", nargs="+", default=["test_custom_models.py"], metavar="FILE")
    parser.add_argument("--only", default=SHORT, help="pytest's -k (default: a few minutes' part)")
    parser.add_argument("--whole", action="store_true", help="all with lora or dora in their name")
    parser.add_argument("--how", choices=["accelerate", "groups"], default="accelerate")
    parser.add_argument("--online", action="store_true", help="models may be downloaded")
    parser.add_argument("--processes", type=int, default=2, help="pytest's -n (default: 2)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "pefts_suite")
    args = parser.parse_args(argv)
    if args.whole:
        args.only = "lora or dora"
    return args


def download(folder: Path) -> Path:
    """Return the installed PEFT's source distribution, got by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--dest", str(folder), f"peft=={version('peft')}"]
    subprocess.run(command, check=True)
    return folder / f"peft-{version('peft')}.tar.gz"


def unpack(archive: Path, folder: Path) -> None:
    """Lay PEFT's tests out as a package that is not called tests, as ours is."""
    with tarfile.open(archive) as tar:
        inside = f"{folder.name}/tests/"
        members = [member for member in tar.getmembers() if member.name.startswith(inside)]
        for member in members:
            member.name = f"pefts_tests/{member.name.removeprefix(inside)}"
        tar.extractall(folder, members, filter="data")
    (folder / "pefts_tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")


def run(
    folder: Path, files: Sequence[str], only: str, how: str, online: bool, processes: int
) -> dict[str, str]:
    """Return {test: "passed", "failed" or "skipped"}."""
    report = folder / f"{how or 'plain'}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.stacks.pefts_suite", "-n", str(processes), "-k", only]
    command += ["--tb=line", f"--junitxml={report}", *files]
    env = os.environ | {ON: how, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    env |= {} if online else {"HF_HUB_OFFLINE": "1"}
    output = folder / f"{how or 'plain'}.log"
    with output.open("w") as log:
        ran = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    if ran.returncode not in (0, 1):
        raise SystemExit(f"pytest ended by {ran.returncode}:\n{output.read_text()[-2000:]}")
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = kinds & {"failure", "error"}
        results[name] = "failed" if bad else "skipped" if "skipped" in kinds else "passed"
    return results


# ---- as a plugin ----


def pytest_configure(config: object) -> None:
    """Stand in for what PEFT's tests import and few use, and have PEFT call `accelerate`."""
    if ON not in os.environ:
        return
    for name, attribute in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__version__ = "0"  # type: ignore[attr-defined]
            setattr(module, attribute, _absent)
            sys.modules[name] = module
    if how := os.environ[ON]:
        _accelerate_everywhere(groups=how == "groups")


def _absent(*args: object, **kwargs: object) -> None:
    raise ImportError("this package is not installed")


def _accelerate_everywhere(groups: bool) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    from lora_ext.integrations.peft import accelerate

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_and_accelerate(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            accelerate(model, groups=groups)
        return result

    BaseTuner.inject_adapter = inject_and_accelerate


if __name__ == "__main__":
    sys.exit(main())
