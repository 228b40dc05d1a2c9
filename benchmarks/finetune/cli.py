"""The command line: arguments, and the order of things."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import lora_ext
from lora_ext.backends import NAMES, unsupported_reasons

from .packages import LIBRARIES, DemoError, require
from .task import Settings


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, Path]:
    """Return the settings and the output folder; bad arguments end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="Fine-tune a pretrained model with the plain LoRA layer and with lora_ext's, "
        "in lockstep, and compare losses, time and memory.",
    )
    parser.add_argument(
        "--task",
        choices=("sms", "shakespeare"),
        default="sms",
        help="sms: MiniLM finds spam (default); shakespeare: SmolLM2-135M learns the tragedies",
    )
    parser.add_argument("--text", metavar="PATH", help="a text for --task shakespeare to learn")
    parser.add_argument("--quick", action="store_true", help="a few steps, for CI")
    parser.add_argument(
        "--steps", type=_at_least(1), help="training steps (default: one epoch of sms, 40 else)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help="default 0")
    parser.add_argument("--threads", type=_at_least(1), help="CPU threads (default: torch's)")
    parser.add_argument("--backend", choices=NAMES, help="of our layers (default: the first able)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder (default demo-output)"
    )
    got = parser.parse_args(argv)
    if got.text is not None and got.task != "shakespeare":
        parser.error("--text goes with --task shakespeare")
    if got.text is not None and not Path(got.text).is_file():
        parser.error(f"--text must name a file, there is none at {got.text}")
    if got.out.exists() and not got.out.is_dir():
        parser.error(f"--out must be a folder, {got.out} is a file")
    if got.backend and (why := _why_not(got.backend)):
        parser.error(f"--backend {got.backend} can't run here: {why}")
    threads = got.threads or torch.get_num_threads()
    settings = Settings(got.task, got.quick, got.seed, threads, got.backend, got.steps, got.text)
    return settings, got.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, or 1 after a message if something is missing or wrong."""
    settings, out = parse(argv)
    try:
        require(*LIBRARIES)
        from .compare import compare
        from .compare_sharded import compare_sharded, world_size

        (compare if world_size() == 1 else compare_sharded)(settings, out)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


def _at_least(least: int):
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def _why_not(backend: str) -> str | None:
    layer = lora_ext.LinearWithLoRA(torch.nn.Linear(2, 2), 1, 1.0)
    return unsupported_reasons(torch.zeros(1, 2), layer.weight, layer.lora.A)[backend]
