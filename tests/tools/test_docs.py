"""The code of each page runs; every link, command and path that a page names exists."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from docs import render
from lora_ext.testing import check_backend

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs/design.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
FOLDERS = "csrc|lora_ext|tests|benchmarks|docs"


def test_the_backend_of_the_design_page_keeps_the_rule():
    (source,) = BLOCK.findall(DESIGN.read_text())
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


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What the code of a page takes for given: its reader has a model.
MODEL = """
import torch
from torch import nn
import lora_ext
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
"""
LORA_MODEL = MODEL + "lora_ext.replace_linear_with_lora(model, rank=2, alpha=4)\n"
PEFT_MODEL = """
from peft import LoraConfig, get_peft_model
peft_model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(target_modules=["0"]))
"""
MESH = """
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
block = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
lora_ext.replace_linear_with_lora(block, rank=2, alpha=4)
"""
GIVEN = {
    "README.md": MODEL
    + """
from lora_ext import lora_linear
x, weight, bias, A, B, alpha = *map(torch.randn, [(5, 16), (4, 16), 4, (16, 2), (2, 4)]), 2.0
train = lambda model: model(x).sum().backward()
"""
    + PEFT_MODEL,
    "docs/packing.md": LORA_MODEL,
    "docs/stacks.md": MODEL + PEFT_MODEL + MESH,
}
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text()) and page != DESIGN]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path):
    """In a process and a folder of its own, from top to bottom, by torchrun if it says so."""
    code = GIVEN.get(name_of(page), "") + "\n".join(BLOCK.findall(page.read_text()))
    torchrun = re.search(r"^# .*: torchrun --nproc-per-node (\d)", code, re.M)
    by, ranks = [], int(torchrun[1]) if torchrun else 0
    if torchrun:  # at a free port: the usual one may be another run's
        by = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        code += "\nimport os, pathlib\npathlib.Path('done' + os.environ['RANK']).touch()\n"
    script = tmp_path / "page.py"
    script.write_text(code)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", *by, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # After its last line a process of torch 2.14's with gloo and fully_shard aborts in one run of
    # twelve, while the interpreter ends, of a plain model too.
    done = bool(ranks) and all((tmp_path / f"done{rank}").exists() for rank in range(ranks))
    assert ran.returncode == 0 or done, ran.stderr


def test_the_example_page_is_of_its_script():
    """Text and code, in order; a picture for each number. What it printed is not compared."""
    page = (ROOT / "docs/example.md").read_text()
    at = 0
    for kind, text in render.cells_of(render.SCRIPT.read_text()):
        cell = f"```python\n{text}\n```" if kind == "python" else text
        assert cell in page[at:], f"run python -m docs.render: the page lacks\n{cell}"
        at = page.index(cell, at) + len(cell)
    pictures = re.findall(r"\]\((example-\d\.svg)\)", page)
    assert len(pictures) == 2 and all((ROOT / "docs" / name).exists() for name in pictures)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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
