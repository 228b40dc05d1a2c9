"""Memory of a training step on the CPU, scratch of the kernels included: the process's own peak."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
M, K, N, R = 2048, 768, 1536, 16
Y_KIB, DX_KIB = M * N * 4 // 1024, M * K * 4 // 1024
# h, t, gradients of A and B and the rest, and the panels of a weight: of a strip of 256 columns for
# each of few threads, or of up to 8 Mi elements for many, which is all of this one.
REST_KIB = 1024
STRIPS_KIB = {2: 2 * 256 * max(K, N) * 4 // 1024, 64: K * N * 4 // 1024}
SCRIPT = f"""
import sys
import torch
from lora_ext import LinearWithLoRA
from lora_ext.testing import LinearWithLoRA as PlainLinearWithLoRA

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

def step():
    y = layer(x)
    y.backward(dy)
    x.grad = layer.lora.A.grad = layer.lora.B.grad = None

torch.set_num_threads(int(sys.argv[2]))
linear = torch.nn.Linear({K}, {N}).requires_grad_(False)
layer = (LinearWithLoRA if sys.argv[1] == "ours" else PlainLinearWithLoRA)(linear, {R}, 0.5)
x, dy = torch.randn({M}, {K}, requires_grad=True), torch.randn({M}, {N})
for _ in range(3):
    step()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
step()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def peak_and_kept_kib(layer: str, threads: int) -> tuple[int, int]:
    """Return what a step takes at most and what it leaves behind, KiB."""
    # Large blocks are given back when they are freed, so that the peak is that of one step.
    # AVX2: where the base product is ours, and packs.
    isa = {"LORA_EXT_CPU_ISA": "avx2"}
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, layer, str(threads)],
        env=os.environ | malloc | isa | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    peak, kept = ran.stdout.split()
    return int(peak), int(kept)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system has no peak to reset"
)
@pytest.mark.parametrize("threads", STRIPS_KIB)
def test_step_needs_less_than_plain_by_its_temporaries(threads):
    """Plain holds linear(x), h @ B and alpha times that at once; ours its results and scratch."""
    (ours, kept), (plain, _) = (peak_and_kept_kib(layer, threads) for layer in ("ours", "plain"))
    assert ours <= Y_KIB + DX_KIB + STRIPS_KIB[threads] + REST_KIB
    assert ours <= plain - Y_KIB
    assert kept <= 1024
