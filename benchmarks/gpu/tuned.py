"""Show what the Triton backend has measured on this card: every candidate, predicted and measured.

They are in the tuning file, which the first call of each size writes.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from .. import device_here, writable


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a candidate, the chosen one marked; return 0, or 2 without Triton."""
    args = _parse(argv)
    if find_spec("triton") is None:
        print("the package triton is not there; install it: pip install triton")
        return 2
    from lora_ext.backends.triton.tuning import card_of, tuning_file

    path = tuning_file(card_of(torch.device(args.device)))
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        print(f"nothing has been measured on {args.device} yet: there is no {path}")
        return 0
    for problem, found in kept.items():
        print(problem)
        for line in lines(found):
            print(line)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each candidate of one size: regime, tile, microseconds, and their ratio."""
    for one in found["candidates"]:
        measured = one["measured_us"]
        chosen = found["chosen"] == [one["regime"], *one["tile"]]
        figures = f"predicted {one['predicted_us']:9.1f} us"
        if measured is None:
            figures += "   could not run"
        else:
            ratio = measured / one["predicted_us"]
            figures += f"   measured {measured:9.1f} us   {ratio:5.2f} of it"
        yield f"  {'*' if chosen else ' '} {one['regime']:13} {figures}   {one['tile']}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tuned", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", type=device_here, choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=writable, metavar="FILE", help="copy the file there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
