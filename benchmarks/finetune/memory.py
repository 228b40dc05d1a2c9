"""Peak memory of a training step, measured for each run in a process of its own.

In one process the runs would share what the allocator keeps, and the first would pay for all.
`python -m benchmarks.finetune.memory`, the request as JSON on stdin, is the other side of `peak_mib`.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .packages import DemoError
from .task import Settings, make_task

STEPS = 3  # the second has the optimizer's state, the third shows that no more comes
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc learns to keep large freed blocks; a fixed threshold returns each at once, so that the
# resident set is what is alive, and the same in every process.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def peak_mib(kind: str, settings: Settings) -> float | None:
    """Return the peak of resident memory in training above that with the model loaded, in MiB.

    Three steps on the largest batch of the run. None where the system does not tell
    (/proc/self/clear_refs is Linux's).

    Args:
        kind: which run, see train.Run.
        settings: of the demo.

    Raises:
        DemoError: the process failed.

    """
    if not os.access(_CLEAR, os.W_OK):
        return None
    done = subprocess.run(
        # The warning about a missing extension was already given by this process.
        [sys.executable, "-W", "ignore", "-m", "benchmarks.finetune.memory"],
        input=json.dumps({"kind": kind, "settings": asdict(settings)}),
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise DemoError(f"measuring the memory of {kind!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def _measure(kind: str, settings: Settings) -> float:
    from .train import Run

    torch.set_num_threads(settings.threads)
    task = make_task(settings)
    run = Run(kind, task, task.build(settings.seed), settings)
    batches = sorted(task.batches(settings.seed), key=lambda batch: batch["input_ids"].numel())
    # Weights mapped from a file become resident when read, and the first call of a kernel sets up
    # its threads and scratch: both happen before the measurement.
    for parameter in run.model.parameters():
        parameter.sum()
    with torch.no_grad():
        task.loss(run.model, batches[0])
    _CLEAR.write_text("5")  # sets the peak to what is resident now
    before = _resident_mib("VmRSS")
    for _ in range(STEPS):
        run.step(task, batches[-1], settings.seed)
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise DemoError(f"{_STATUS} does not tell {field}")
    return int(found[1]) / 1024


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(json.dumps({"peak_mib": _measure(request["kind"], Settings(**request["settings"]))}))
