"""`python -m benchmarks.scaling`."""

import sys

from .simulate import main

sys.exit(main())
