"""Types of command-line arguments; each names what it expected and what came."""

import argparse
from pathlib import Path

from .compare import read_run
from .grids import Shape, parse_shape
from .providers import PROVIDERS


def shape(text: str) -> Shape:
    """Read M,K,N,R."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def provider_names(text: str) -> list[str]:
    """Read names of providers, or all."""
    names = list(PROVIDERS) if text == "all" else list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        known = ", ".join(PROVIDERS)
        raise argparse.ArgumentTypeError(f"no provider {unknown[0]!r}, there are: {known}")
    return names


def positive(kind: type):
    """Return a reader of positive, finite numbers of a kind: int or float."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return convert


def earlier_run(text: str) -> dict:
    """Read the file of an earlier run."""
    try:
        return read_run(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def writable(text: str) -> Path:
    """Take the name of a file that can be written."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be written at {text}")
    return path
