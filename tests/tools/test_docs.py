"""The design page's code runs; every link, command and path that a page names exists."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import lora_ext
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


def test_the_readme_is_read_in_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 900


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


def unknown_names(text: str) -> list[str]:
    """Return the names of lora_ext that a page's Python uses and lora_ext has not."""
    lost = []
    for source in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lora_ext":
                lost += [] if hasattr(lora_ext, node.attr) else [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_ext"):
                # Read and not imported: integrations import what they integrate.
                code = ROOT.joinpath(*node.module.split(".")).with_suffix(".py").read_text()
                defined = re.findall(r"^(?:def|class) (\w+)", code, re.M)
                lost += [alias.name for alias in node.names if alias.name not in defined]
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    assert missing(page.read_text(), page) == []
    assert unknown_names(page.read_text()) == []


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
    code = "from lora_ext.distributed import LoRAColwiseParallel, Sideways\nlora_ext.nothing(x)\n"
    assert set(unknown_names(f"```python\n{code}```\n")) == {"Sideways", "nothing"}
