"""The site of the pages in this folder: `make docs`."""

import importlib.metadata
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
# Pages whose text stands elsewhere in the repository, and is not to stand here again.
ELSEWHERE = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "cpu-notes": "benchmarks/results/cpu_notes.md",
    "gpu-notes": "benchmarks/results/gpu_notes.md",
}

project = "lora_ext"
author = copyright = "the lora_ext developers"
release = version = importlib.metadata.version("lora_ext")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "lora_ext"
myst_heading_anchors = 3  # headings have the names that GitHub gives them
autodoc_member_order = "bysource"
autodoc_mock_imports = ["peft"]  # the API page needs its names alone
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]


def read_elsewhere(app: Sphinx, page: str, source: list[str]) -> None:
    """Put a text of the repository where a page names it, its links as seen from this folder."""
    pages = {path: f"{name}.md" for name, path in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        from_root = (folder / target).resolve().relative_to(ROOT).as_posix()
        if from_root in pages:
            return f"]({pages[from_root]}{anchor})"
        here = from_root.removeprefix("docs/")
        return f"]({here if here != from_root else '../' + here}{anchor})"

    folder = Path(app.srcdir, page).parent
    if page in ELSEWHERE:
        file = ROOT / ELSEWHERE[page]
        folder = file.parent
        toctrees = source[0].partition("```{toctree}")
        source[0] = file.read_text() + "\n" + "".join(toctrees[1:])
        app.env.note_dependency(str(file))  # read again when it changes
    if "/" not in page:
        source[0] = re.sub(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", link, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_elsewhere)
