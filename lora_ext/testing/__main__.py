"""`python -m lora_ext.testing`: hold ours to PEFT's own layers, in the environment at hand."""

import sys
import warnings

from .parity import check_parity, every_parity, why_skipped


def main() -> int:
    """Print a line for each check; the number of those that failed is the exit status, up to 1."""
    warnings.simplefilter("ignore")
    failed = skipped = passed = 0
    for case in every_parity():
        if (why := why_skipped(case)) is not None:
            skipped += 1
            print(f"skipped  {case}: {why}")
            continue
        try:
            check_parity(case)
        except Exception as error:  # a check that can't run has not passed
            failed += 1
            print(f"FAILED   {case}: {type(error).__name__}: {error}")
        else:
            passed += 1
            print(f"passed   {case}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0 or not passed)


if __name__ == "__main__":
    sys.exit(main())
