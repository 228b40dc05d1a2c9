"""The design page's code runs; every link, command and path that a page names exists."""

import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from lora_ext.testing import check_backend

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs/design.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = "csrc|lora_ext|tests|benchmarks|docs"


def test_the_backend_of_the_design_page_keeps_the_rule():
    (source,) = re.findall(r"^```python\n(.*?)^```", DESIGN.read_text(), re.M | re.S)
    assert len(source.splitlines()) <= 40
    backend = ModuleType("addmm")
    exec(compile(source, str(DESIGN), "exec"), backend.__dict__)
    refused = check_backend(backend)
    assert refused and all(
        "takes no dropout mask" in r or "plain weight" in r for r in refused.values()
    )


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(text: str, page: Path) -> list[str]:
    """Return the links, modules, make targets and paths in a page's text that are not there."""
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        if ":" in path:  # another site's
            continue
        if not to.exists() or (anchor and anchor not in anchors(to.read_text())):
            lost.append(target)
    for module in re.findall(r"\s-m ([a-z_][\w.]*\w)", text):
        file = ROOT.joinpath(*module.split("."))
        ours = (ROOT / module.partition(".")[0]).is_dir()
        there = file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()
        if not (there if ours else find_spec(module.partition(".")[0])):
            lost.append(f"python -m {module}")
    makefile = (ROOT / "Makefile").read_text()
    for targets in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.M):
        for target in targets.split():
            if not re.search(rf"^([a-z-]+ )*{target}( [a-z-]+)*:", makefile, re.M):
                lost.append(f"make {target}")
    for path in re.findall(rf"[` ]((?:{FOLDERS})/[\w./-]*[\w/])[`:]", text):
        if not (ROOT / path).exists():
            lost.append(path)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    assert missing(page.read_text(), page) == []


def test_what_is_not_there_is_found():
    text = """
    [there](docs/design.md#add-a-backend) [elsewhere](https://a.org/b.md) [lost](docs/none.md)
    [heading](docs/design.md#none) `python -m lora_ext`, `python -m benchmarks.none --help`,
    `torchrun -m benchmarks.scaling`, `python -m nothing_of_this_name`, `csrc/call.h`, `csrc/none.h`
    `make test ARGS="-k none"`, `make none`
    """
    assert missing(text, ROOT / "README.md") == [
        "docs/none.md",
        "docs/design.md#none",
        "python -m benchmarks.none",
        "python -m nothing_of_this_name",
        "make none",
        "csrc/none.h",
    ]
