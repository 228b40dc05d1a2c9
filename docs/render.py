"""Run docs/example.py cell by cell, and write docs/example.md with what each cell prints and draws.

    python -m docs.render

A cell begins at `# %%`, one of text at `# %% [markdown]`, as editors and Jupyter know them.
"""

import io
import os
import re
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.runs import make_header

SCRIPT = Path(__file__).resolve().with_name("example.py")
MADE = "<!-- made from docs/example.py by `python -m docs.render` -->"


def cells_of(script: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each cell, the kind "markdown" or "python"."""
    found = re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.M | re.S)
    cells = []
    for text_cell, body in found:
        if text_cell:
            lines = body.strip("\n").splitlines()
            cells.append(("markdown", "\n".join(re.sub("^# ?", "", line) for line in lines)))
        else:
            cells.append(("python", body.strip("\n")))
    return cells


def run(cells: list[tuple[str, str]], picture: str) -> tuple[list[str], list[bytes]]:
    """Run the cells in a folder of their own; return the page's parts and its pictures, SVG.

    Args:
        cells: as `cells_of` returns them.
        picture: the pictures' name in the page, with a {} for the number.

    """
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "lora_ext"  # the same names in the file at each run
    space: dict[str, Any] = {"__name__": "__main__"}
    parts, pictures = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind, text in cells:
            if kind == "markdown":
                parts.append(text)
                continue
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(text, str(SCRIPT), "exec"), space)
            parts.append(f"```python\n{text}\n```")
            if printed.getvalue():
                parts.append(f"```text\n{printed.getvalue().rstrip()}\n```")
            for number in plt.get_fignums():
                file = io.BytesIO()
                plt.figure(number).savefig(file, format="svg", metadata={"Date": None})
                pictures.append(file.getvalue())
                parts.append(f"![what the cell above draws]({picture.format(len(pictures))})")
            plt.close("all")
    return parts, pictures


def conditions() -> str:
    """Return a line on the machine that the page's figures come from."""
    header = make_header("cpu", "")
    return (
        f"The figures below are of one run on {header['device']} ({header['instruction_set']}), "
        f"one thread, torch {header['torch']}, {header['date'][:10]}. The machine had other work."
    )


def main() -> int:
    """Write the page and its pictures; return 0."""
    parts, pictures = run(cells_of(SCRIPT.read_text()), "example-{}.svg")
    parts.insert(1, conditions())
    SCRIPT.with_suffix(".md").write_text("\n\n".join([MADE, *parts]) + "\n")
    for number, picture in enumerate(pictures, 1):
        SCRIPT.with_name(f"example-{number}.svg").write_bytes(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
