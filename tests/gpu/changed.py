"""Copies of a module of kernels with one place of its source changed, for the tests to refuse."""

import importlib.util
from pathlib import Path
from types import ModuleType

from lora_ext.backends import triton as backend


def changed(module: ModuleType, change: tuple[str, str], folder: Path) -> ModuleType:
    """Return a copy of a module with one place changed: from a file, which Triton reads it from."""
    source = Path(module.__file__).read_text()
    assert source.count(change[0]) == 1, f"{change[0]!r} is not there once: fix the test"
    path = folder / "changed.py"
    path.write_text(source.replace(*change))
    spec = importlib.util.spec_from_file_location(f"{backend.__name__}.changed", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
