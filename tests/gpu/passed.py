"""What each of two versions of Triton has compiled for every card without a fault.

`python -m tests.gpu.passed` compiles all that the library offers with the Triton that is there, and
prints this table; it ends with 1 where a kernel has a fault. Under TRITON_CACHE_DIR it takes up
where another run ended. An hour on one core.
"""

import argparse
import json
import sys
from collections.abc import Iterable

import triton

from lora_ext.backends.triton import cards
from tests.gpu.configurations import DTYPES, distinct, faults_of, inspect, offered

VERSIONS = ("3.6.0", "3.8.0")
# By card; kind of product, direction and regime; tiles.
PASSED: dict[str, dict[str, list[str]]] = {}


def faults(family: str, types: str) -> Iterable[str]:
    """Compile all that a card is offered of some dtypes; yield what is wrong."""
    for index in range(len(distinct(family, types))):
        row = inspect(family, types, index)
        for fault in faults_of(row, family):
            yield f"{family} {row} {fault}"


def main() -> int:
    """Print each fault, and the tiles of the cards that have none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=lambda text: text.split(","), default=cards.FAMILIES)
    asked, found = parser.parse_args().cards, False
    for family in asked:
        for types in DTYPES:
            wrong = list(faults(family, types))
            print(f"{family} {types}: {len(distinct(family, types))} kernels", *wrong, sep="\n  ")
            sys.stdout.flush()
            found = found or bool(wrong)
    print(f"Triton {triton.__version__}:", json.dumps({f: offered(f) for f in asked}, indent=4))
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
