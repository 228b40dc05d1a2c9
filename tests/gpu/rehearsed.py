"""Run a module with Triton's interpreter repaired: `python -m tests.gpu.rehearsed MODULE ...`.

For the benchmarks of gpu_check's rehearsal, which tests/conftest.py does not reach: interpreter.py
says what is wrong. Without it Triton 3.6 under NumPy 2.5 stops at a loop over a loaded value.
"""

import os
import runpy
import sys


def main() -> None:
    """Repair the interpreter where it is on, and be the module that is named."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.gpu import interpreter

        interpreter.repair()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
