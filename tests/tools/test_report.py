"""`python -m lora_ext`: what the report says, and what it says where something is wrong."""

import re
from types import SimpleNamespace

import pytest
import torch

from lora_ext import __main__ as report
from lora_ext import gains
from lora_ext.backends import BACKENDS, NAMES, cpp
from tests.conftest import small_call

ROWS = "lora_ext python system cpu threads torch gpu triton compiler extension cuda-kernels".split()


def tables(text: str) -> dict[str, dict[str, str]]:
    """Read {title: {row: value}}; the verdict has the title ""."""
    found: dict[str, dict[str, str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("  "):
            name, value = re.fullmatch(r"  (.+?): +(\S.*)", line).groups()
            found[title][name.replace(" ", "-")] = value
        else:
            title = line.removesuffix(":") if line.endswith(":") else ""
            found[title] = {"": line}
    return found


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(gains, "SECONDS", 0.0)

    def run(*arguments: str, status: int = 0) -> dict[str, dict[str, str]]:
        assert report.main(arguments) == status
        return tables(capsys.readouterr().out)

    return run


def test_report_tells_what_was_found_what_runs_and_why_the_others_do_not(run):
    text = run()
    assert list(text["found"])[1:] == ROWS
    assert text["found"]["torch"].startswith(torch.__version__)
    chosen = [name for name, value in text["backends for cpu"].items() if value == "runs"]
    for device in ("cpu", "cuda"):
        assert set(text[f"backends for {device}"]) == {"", *NAMES}
    assert len(chosen) == 1 and all(text["backends for cpu"].values())
    tested = [name for name in text["self-test"] if name.endswith("-on-cpu")]
    for name in NAMES:
        can_run = BACKENDS[name].unsupported(small_call()) is None
        assert (f"{name}-on-cpu" in tested) == can_run
    assert re.fullmatch(rf"lora_ext \S+ works on cpu with backend '{chosen[0]}'.*", text[""][""])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_no_backend_is_tried_for_cuda(run):
    text = run()
    assert text["found"]["gpu"] == "none that PyTorch finds"
    assert text["backends for cuda"]["cpp"] == "not tried, PyTorch finds no CUDA device"


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_a_wrong_backend_is_named_in_the_verdict(run, monkeypatch, wrong):
    """A low-rank part that is lost does not pass, nor does a NaN as a small error."""
    right = BACKENDS["reference"]
    broken = SimpleNamespace(
        unsupported=lambda *_: None,
        forward=lambda call: right.forward(call._replace(low=call.low._replace(scale=wrong))),
        backward=right.backward,
    )
    monkeypatch.setitem(BACKENDS, "cpp", broken)
    text = run(status=1)
    assert text["self-test"]["cpp-on-cpu"].startswith("failed: y: max error")
    assert text["self-test"]["reference-on-cpu"].startswith("passed")
    verdict = text[""][""]
    assert re.fullmatch(r"lora_ext \S+ is NOT right on this machine: .*cpp on cpu", verdict)


def test_a_backend_that_raises_does_not_end_the_report(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("a kernel that can't run")

    monkeypatch.setattr(BACKENDS["reference"], "forward", broken)
    text = run(status=1)
    said = text["self-test"]["reference-on-cpu"]
    assert said == "failed: RuntimeError: a kernel that can't run"


def test_extension_that_is_not_built_is_said(run, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert run()["found"]["extension"] == "not built"


def test_what_is_expected_has_to_run(run, monkeypatch):
    run("--expect", "reference")
    monkeypatch.setattr(BACKENDS["cpp"], "unsupported", lambda call: "does not load")
    for arguments in ([], ["--expect", "cpp"]):  # what is installed is expected
        verdict = run(*arguments, status=1)[""][""]
        assert verdict == "backend 'cpp' is expected and can't run here: does not load"
    with pytest.raises(SystemExit):
        run("--expect", "mkl")


def test_the_gain_is_measured_and_what_would_help_is_named(run, monkeypatch):
    monkeypatch.setenv("LORA_EXT_CPU_ISA", "avx2")
    text = run()
    (measured,) = (rows for title, rows in text.items() if title.startswith("plain layer's time"))
    for dtype in ("float32", "bfloat16"):
        ratio, low, high = map(
            float,
            re.match(
                r"([\d.]+)x \(([\d.]+) to ([\d.]+)\): plain [\d.]+ ms", measured[dtype]
            ).groups(),
        )
        assert 0 < low <= ratio <= high
    help_ = text["what would make it faster"]
    assert help_["instruction-set"] == "unset LORA_EXT_CPU_ISA, which holds the kernels to avx2"


def test_without_the_extension_the_command_that_builds_it_is_named(run, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    monkeypatch.setattr(BACKENDS["cpp"], "unsupported", lambda call: "not built")
    text = run()
    assert "--no-build-isolation -e ." in text["what would make it faster"]["C++-kernels"]
    (routes,) = (rows for title, rows in text.items() if title.startswith("whose product"))
    assert all(routes[dtype].startswith("PyTorch's") for dtype in ("float32", "bfloat16"))


@pytest.mark.parametrize(("threads", "cpus", "said"), [(1, 8, True), (4, 8, False), (9, 8, True)])
def test_threads_that_do_not_fit_the_cpus_are_named(monkeypatch, threads, cpus, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(gains.os, "sched_getaffinity", lambda pid: set(range(cpus)))
    helps = dict(gains.hints({"cpu": {"cpp": "not built"}}))
    assert ("threads" in helps) == said


def test_a_gpu_without_kernels_is_told_what_they_lack():
    reasons = {"triton": "needs a C compiler", "cpp": "not built", "reference": None}
    helps = list(gains.hints({"cpu": {"cpp": "not built"}, "cuda": reasons}))
    assert ("GPU kernels", "triton: needs a C compiler") in helps


@pytest.fixture
def no_answers_kept():
    """Ask again about the CUDA library, and forget the answers."""
    caches = cpp.load_cuda, cpp._why_not_on
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_cuda_library_that_is_not_there_says_how_to_build_it(monkeypatch, no_answers_kept):
    monkeypatch.setattr(cpp, "find_spec", lambda name: None)
    why = cpp._why_not_on(torch.device("cuda:0"))
    assert why.startswith("the library lora_ext._cuda is not there; with a CUDA torch")
    assert "LORA_EXT_BUILD=cuda pip install --no-build-isolation -e ." in why


def test_cuda_library_next_to_a_torch_for_the_cpu_is_named(monkeypatch, no_answers_kept):
    monkeypatch.setattr(cpp, "find_spec", lambda name: SimpleNamespace(origin="_cuda.so"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cpp.load_cuda() == (
        f"torch {torch.__version__} is not built for CUDA, lora_ext._cuda is"
    )


@pytest.mark.parametrize("built", ["12.8 for 8.0 9.0 and PTX", "13.0 for 8.0", "none"])
def test_cuda_library_of_another_major_version_is_named(monkeypatch, no_answers_kept, built):
    extension = SimpleNamespace(build_info=lambda: {"cuda": built})
    loaded = []
    monkeypatch.setattr(cpp, "find_spec", lambda name: SimpleNamespace(origin="_cuda.so"))
    monkeypatch.setattr(cpp, "import_module", lambda name: extension)
    monkeypatch.setattr(cpp, "_not_loaded", None)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    why = cpp.load_cuda()
    if built.startswith("13."):
        assert why is None and loaded == ["_cuda.so"]
        return
    assert not loaded
    if built == "none":  # left over from an earlier build
        assert why.startswith("the library lora_ext._cuda is there, but not of the last build")
        return
    assert why.startswith("the library lora_ext._cuda is built for CUDA 12.8, torch ")
    assert f"torch {torch.__version__} for 13.2; with a CUDA torch" in why


def test_cuda_library_that_does_not_load_says_why(monkeypatch, no_answers_kept, tmp_path):
    library = tmp_path / "_cuda.so"
    library.write_text("no library")
    monkeypatch.setattr(cpp, "find_spec", lambda name: SimpleNamespace(origin=str(library)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp, "_not_loaded", "not asked")
    assert re.match(
        r"the library lora_ext._cuda does not load \(.*_cuda.so: \w.*too short", cpp.load_cuda()
    )


@pytest.mark.parametrize(
    ("capability", "why"),
    [((7, 5), "needs compute capability 8.0, Some GPU has 7.5"), ((8, 0), None), ((12, 0), None)],
)
def test_old_card_is_named(monkeypatch, no_answers_kept, capability, why):
    monkeypatch.setattr(cpp, "load_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert cpp._why_not_on(torch.device("cuda:0")) == why
