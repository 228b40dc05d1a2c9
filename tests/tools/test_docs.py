"""The code on the pages of docs/ runs."""

import re
from pathlib import Path
from types import ModuleType

from lora_ext.testing import check_backend

DESIGN = Path(__file__).parents[2] / "docs/design.md"


def test_the_backend_of_the_design_page_keeps_the_rule():
    (source,) = re.findall(r"^```python\n(.*?)^```", DESIGN.read_text(), re.M | re.S)
    assert len(source.splitlines()) <= 40
    backend = ModuleType("addmm")
    exec(compile(source, str(DESIGN), "exec"), backend.__dict__)
    refused = check_backend(backend)
    assert refused and all(
        "takes no dropout mask" in r or "plain weight" in r for r in refused.values()
    )
