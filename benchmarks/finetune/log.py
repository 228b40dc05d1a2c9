"""What the demo says and writes on its way: each stage with the time so far, and the results."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.runs import make_header

from .tasks import Task


class Log:
    """The console and the file of results: a demo that is cut short leaves what it has measured.

    Args:
        task: what is trained.
        results: of all runs, which they fill.
        out: the folder of the file, `TASK.json`: losses in nats, times in ms, memory in MiB.
        console: rich's; one that is quiet belongs to a process that writes nothing either.

    """

    def __init__(self, task: Task, results: Sequence[Any], out: Path, console: Any) -> None:
        self.console, self._results = console, results
        self._path, self._begin = out / f"{task.settings.task}.json", time.perf_counter()
        header = make_header("cpu", "python -m benchmarks.finetune")
        self._document: dict[str, Any] = {"header": header, "settings": asdict(task.settings)}

    def stage(self, text: str) -> None:
        """Say what begins now and how long the demo has run; write the results so far."""
        self.console.print(f"[dim]{time.perf_counter() - self._begin:6.1f} s[/]  {text}")
        self._document["stage"] = text
        self.save()

    def save(self) -> None:
        """Write the results so far."""
        if not self.console.quiet:
            self._document["runs"] = [asdict(result) for result in self._results]
            self._path.write_text(json.dumps(self._document, indent=1) + "\n")
