"""The configurations that the oldest Triton supported has compiled without a fault.

The tests compile with the Triton that is installed; what is offered to any card has passed both.
`python -m tests.gpu.passed` with Triton 3.6.0 compiles it: it prints each fault and this table, and
ends with 1 where there is a fault. With
TRITON_CACHE_DIR set it takes up where another run ended. 5 minutes a card on one core.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import triton

from lora_ext.backends.triton import cards
from tests.gpu.configurations import DTYPES, configurations, faults_of, inspect, offered

# kernel: {block sizes M, N, K and R, warps, stages: cards}
PASSED = {
    "lora_linear_bwd_dx_kernel": {
        "128x32x128x16 8w 4s": "sm_80",
        "128x32x128x32 8w 4s": "sm_80",
        "128x64x0x16 4w 4s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "128x64x0x32 4w 4s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x32x128x16 8w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x32x128x32 8w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x32x64x32 4w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x64x0x32 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x64x64x16 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "64x64x64x32 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "128x64x128x16 8w 3s": "sm_90 sm_100",
        "128x64x128x32 8w 3s": "sm_90 sm_100",
        "128x64x256x16 8w 3s tma": "sm_90",
        "128x64x256x32 8w 3s tma": "sm_90",
        "64x64x128x16 4w 4s tma": "sm_90 sm_100",
        "64x64x128x32 4w 4s tma": "sm_90 sm_100",
        "128x32x128x16 8w 3s": "sm_86 sm_89 sm_120",
        "128x32x128x32 8w 3s": "sm_86 sm_89 sm_120",
        "128x64x0x16 4w 2s": "gfx942",
        "128x64x0x32 4w 2s": "gfx942",
        "128x64x128x16 8w 2s": "gfx942",
        "128x64x128x32 8w 2s": "gfx942",
        "64x32x128x16 8w 2s": "gfx942",
        "64x32x128x32 8w 2s": "gfx942",
        "64x64x64x16 4w 2s": "gfx942",
        "64x64x64x32 4w 2s": "gfx942",
        "128x64x128x16 8w 4s tma": "sm_100",
        "128x64x128x32 8w 4s tma": "sm_100",
    },
    "lora_linear_bwd_dy_kernel": {
        "128x64x0x16 8w 3s": "sm_80 sm_86 sm_89 sm_90",
        "128x64x0x64 8w 3s": "sm_80 sm_86 sm_89 sm_90",
        "32x32x0x64 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "32x64x0x64 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "32x64x0x64 4w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x32x0x64 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x64x0x64 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x64x0x64 4w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "128x32x0x16 4w 3s": "sm_90",
        "128x32x0x64 4w 3s": "sm_90",
        "64x64x0x16 4w 3s": "sm_100 sm_120",
        "32x64x0x16 4w 2s": "gfx942",
    },
    "lora_linear_decode_kernel": {
        "16x32x128x64 8w 4s": "sm_80 sm_90 sm_100",
        "16x32x32x64 4w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "16x64x64x64 4w 4s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x32x128x32 8w 4s": "sm_80 sm_90 sm_100",
        "64x64x64x32 4w 4s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "16x32x128x64 8w 3s": "sm_86 sm_89 sm_120",
        "64x32x128x32 8w 3s": "sm_86 sm_89 sm_120",
        "16x32x128x64 8w 2s": "gfx942",
        "16x64x64x64 4w 2s": "gfx942",
        "64x32x128x32 8w 2s": "gfx942",
        "64x64x64x32 4w 2s": "gfx942",
    },
    "lora_linear_fwd_in_loop_kernel": {
        "128x128x32x16 8w 4s": "sm_80",
        "128x128x32x64 8w 4s": "sm_80",
        "64x64x32x64 4w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x64x64x16 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "64x64x64x64 4w 3s": "sm_80",
        "128x128x64x16 8w 3s": "sm_90 sm_100",
        "128x128x64x64 8w 3s": "sm_90 sm_100",
        "128x256x64x16 8w 3s tma": "sm_90",
        "128x256x64x64 8w 3s tma": "sm_90",
        "64x128x64x16 4w 4s tma": "sm_90 sm_100",
        "64x128x64x64 4w 4s tma": "sm_90 sm_100",
        "128x128x32x16 8w 3s": "sm_86 sm_89 sm_120",
        "128x128x32x64 8w 3s": "sm_86 sm_89 sm_120",
        "128x128x64x16 8w 2s": "gfx942",
        "128x128x64x64 8w 2s": "gfx942",
        "64x64x64x16 4w 2s": "gfx942",
        "64x64x64x64 4w 2s": "gfx942",
        "128x128x64x16 8w 4s tma": "sm_100",
        "128x128x64x64 8w 4s tma": "sm_100",
    },
    "lora_linear_fwd_kernel": {
        "128x128x32x16 8w 4s": "sm_80",
        "128x128x32x32 8w 4s": "sm_80",
        "64x128x32x16 8w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x128x32x32 8w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x64x32x32 4w 3s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x64x64x16 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "64x64x64x32 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "128x128x64x16 8w 3s": "sm_90 sm_100",
        "128x128x64x32 8w 3s": "sm_90 sm_100",
        "128x256x64x16 8w 3s tma": "sm_90",
        "128x256x64x32 8w 3s tma": "sm_90",
        "64x128x64x16 4w 4s tma": "sm_90 sm_100",
        "64x128x64x32 4w 4s tma": "sm_90 sm_100",
        "128x128x32x16 8w 3s": "sm_86 sm_89 sm_120",
        "128x128x32x32 8w 3s": "sm_86 sm_89 sm_120",
        "128x128x64x16 8w 2s": "gfx942",
        "128x128x64x32 8w 2s": "gfx942",
        "64x128x32x16 8w 2s": "gfx942",
        "64x128x32x32 8w 2s": "gfx942",
        "64x64x64x16 4w 2s": "gfx942",
        "64x64x64x32 4w 2s": "gfx942",
        "128x128x64x16 8w 4s tma": "sm_100",
        "128x128x64x32 8w 4s tma": "sm_100",
    },
    "lora_linears_bwd_dx_kernel": {
        "128x32x128x16 8w 4s": "sm_80",
        "128x32x128x32 8w 4s": "sm_80",
        "64x64x64x16 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "64x64x64x32 4w 3s": "sm_80 sm_86 sm_89 sm_120",
        "128x64x128x16 8w 3s": "sm_90 sm_100",
        "128x64x128x32 8w 3s": "sm_90 sm_100",
        "128x64x256x32 8w 3s tma": "sm_90",
        "64x64x128x16 4w 4s tma": "sm_90 sm_100",
        "64x64x128x32 4w 4s tma": "sm_90 sm_100",
        "128x32x128x16 8w 3s": "sm_86 sm_89 sm_120",
        "128x32x128x32 8w 3s": "sm_86 sm_89 sm_120",
        "128x64x128x16 8w 2s": "gfx942",
        "128x64x128x32 8w 2s": "gfx942",
        "64x64x64x16 4w 2s": "gfx942",
        "64x64x64x32 4w 2s": "gfx942",
        "128x64x128x16 8w 4s tma": "sm_100",
        "128x64x128x32 8w 4s tma": "sm_100",
    },
    "lora_linears_shrink_kernel": {
        "64x0x64x32 8w 4s": "sm_80 sm_86 sm_89 sm_120",
        "64x0x64x32 4w 3s": "sm_90 sm_100",
        "64x0x64x32 4w 4s": "sm_90 sm_100",
        "64x0x64x32 8w 2s": "gfx942",
    },
    "lora_shrink_kernel": {
        "16x0x32x64 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "16x0x64x64 4w 4s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "64x0x32x64 4w 2s": "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942",
        "64x0x64x16 8w 4s": "sm_80 sm_86 sm_89 sm_120",
        "64x0x64x64 8w 4s": "sm_80 sm_86 sm_89 sm_120",
        "16x0x64x64 4w 3s": "sm_90 sm_100",
        "64x0x64x16 4w 3s": "sm_90 sm_100",
        "64x0x64x16 4w 4s": "sm_90 sm_100",
        "64x0x64x64 4w 3s": "sm_90 sm_100",
        "64x0x64x64 4w 4s": "sm_90 sm_100",
        "16x0x64x64 4w 2s": "gfx942",
        "64x0x64x16 8w 2s": "gfx942",
        "64x0x64x64 8w 2s": "gfx942",
    },
    "lora_linear_bwd_dx_persistent_kernel": {
        "128x128x64x16 8w 4s tma": "sm_90",
        "128x128x64x32 8w 4s tma": "sm_90",
        "128x256x64x16 8w 3s tma": "sm_90",
        "128x256x64x32 8w 3s tma": "sm_90",
    },
    "lora_linear_fwd_persistent_kernel": {
        "128x128x64x16 8w 4s tma": "sm_90 sm_100",
        "128x128x64x32 8w 4s tma": "sm_90 sm_100",
        "128x256x64x16 8w 3s tma": "sm_90",
        "128x256x64x32 8w 3s tma": "sm_90",
    },
}


def faults(family: str, types: str) -> Iterator[str]:
    """Compile all that a card is offered of some dtypes; yield what is wrong."""
    for row in inspect(family, types, offered(family, types)):
        for fault in faults_of(row, family):
            yield f"{row} {fault}"


def table(families: list[str]) -> dict[str, dict[str, str]]:
    """Return what cards are offered in the form of PASSED."""
    found: dict[str, dict[str, str]] = {}
    for family in families:
        for kernel, configuration in sorted(configurations(family)):
            of_kernel = found.setdefault(kernel, {})
            of_kernel[configuration] = f"{of_kernel.get(configuration, '')} {family}".strip()
    return found


def main() -> int:
    """Print each fault, and the table of the cards that have none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=lambda text: text.split(","), default=cards.FAMILIES)
    asked, right = parser.parse_args().cards, []
    for family in asked:
        wrong = []
        for types in DTYPES:
            found = list(faults(family, types))
            count = len(offered(family, types))
            print(f"{family} {types}: {count} kernels", *found, sep="\n  ", flush=True)
            wrong += found
        right += [] if wrong else [family]
    print(f"Triton {triton.__version__}, {len(right)} of {len(asked)} cards:")
    print(json.dumps(table(right), indent=4))
    return int(len(right) < len(asked))


if __name__ == "__main__":
    sys.exit(main())
