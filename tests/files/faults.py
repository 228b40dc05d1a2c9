"""Save an adapter and be stopped: by SIGKILL or an error before any one of the system's calls.

    python -m tests.files.faults --kills 50

kills saves at random moments, which the tests do at chosen ones.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from torch import nn

from lora_ext import (
    load_adapter,
    load_peft_adapter,
    replace_linear_with_lora,
    save_adapter,
    save_peft_adapter,
)

Save = Callable[[nn.Module], None]
PEFT_FILES = ["adapter_config.json", "adapter_model.safetensors"]
CALLS = ("open", "write", "fchmod", "fsync", "replace", "unlink")


def model_of(value: int, width: int = 8) -> nn.Module:
    """Return a model whose adapter holds one value everywhere, in alpha too."""
    model = nn.Sequential(nn.Linear(width, width))
    replace_linear_with_lora(model, 2, float(value), scaling="alpha/rank")
    nn.init.constant_(model[0].lora.A, value)
    nn.init.constant_(model[0].lora.B, value)
    return model


def value_in(path: Path, width: int = 8) -> int:
    """Load an adapter of `model_of`; return its value, which all of it must agree on."""
    model = nn.Sequential(nn.Linear(width, width))
    (load_peft_adapter if path.is_dir() else load_adapter)(model, path)
    lora = model[0].lora
    held = {lora.alpha, *lora.A.unique().tolist(), *lora.B.unique().tolist()}
    assert len(held) == 1, f"parts of two adapters: {held}"
    return int(held.pop())


def assert_peft_finds_one_adapter(folder: Path) -> None:
    """Whoever reads the two files by themselves gets no pair of two adapters."""
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if config.exists() and tensors.exists():
        with safe_open(tensors, "pt") as file:
            values = {float(file.get_tensor(key).max()) for key in file.keys()}  # noqa: SIM118
        assert values == {json.loads(config.read_text())["lora_alpha"]}


@contextlib.contextmanager
def before_call(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Do `act` before the `number`-th of the CALLS that follow."""
    count = itertools.count()

    def wrap(function):
        def call(*args, **kwargs):
            if next(count) == number:
                act()
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, wrap(getattr(os, name))))
        yield


def killed_before(number: int, save: Save, model: nn.Module) -> bool:
    """Save in a child that is killed before the `number`-th call; False if it got through."""

    def child() -> None:
        with before_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            save(model)

    return signal.SIGKILL == _status_of(child)


def killed_after(seconds: float, saves: Iterator[tuple[Save, nn.Module]]) -> None:
    """Save one after the other in a child that is killed after some seconds."""

    def child() -> None:
        for save, model in saves:
            save(model)

    assert _status_of(child, seconds) == signal.SIGKILL


def _status_of(child: Callable[[], None], seconds: float | None = None) -> int:
    """Run a function in a forked child; return the signal that ended it, or 0."""
    process = os.fork()
    if process == 0:
        try:
            child()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    """Kill saves at random moments and look at what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that a fork has no thread to wait for
    random.seed(arguments.seed)
    width = 400
    models = [model_of(value, width) for value in (1, 2)]
    leftovers = 0
    with tempfile.TemporaryDirectory() as name:
        file, folder = Path(name, "a.safetensors"), Path(name, "peft")
        savers = (lambda m: save_adapter(m, file), lambda m: save_peft_adapter(m, folder))
        for save in savers:
            save(models[0])
        for kill in range(arguments.kills):
            saves = itertools.cycle(itertools.product(savers, models))
            killed_after(random.uniform(0, 0.05), saves)
            assert value_in(file, width) in (1, 2) and value_in(folder, width) in (1, 2), kill
            assert_peft_finds_one_adapter(folder)
            left = [f for f in (*os.listdir(name), *os.listdir(folder)) if f.startswith(".")]
            leftovers += len(left)
            for save in savers:
                save(models[0])
            assert sorted(os.listdir(name)) == ["a.safetensors", "peft"], kill
            assert len(os.listdir(folder)) == 2, kill
    print(
        f"{arguments.kills} kills, seed {arguments.seed}: 0 torn adapters, {leftovers} temporary "
        "files left by them, 0 after the next save"
    )


if __name__ == "__main__":
    main()
