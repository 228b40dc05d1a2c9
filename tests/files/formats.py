"""What every kind of checkpoint holds, as formats.json has it; `python -m tests.files.formats`.

That prints what today's code writes. A file of another version has to load for ever: change an
entry of formats.json only by adding one.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_ext import quantise_, replace_linear_with_lora, save_adapter, save_peft_adapter

FILE = Path(__file__).with_suffix(".json")
KINDS = ("plain", "bfloat16", "nf4", "fp4", "int8")  # of a state_dict
TEXT = "bitsandbytes__"  # what a quantised weight is, as bytes of JSON


class Model(nn.Module):
    """Two linears, 16 to 8 with a bias and 8 to 4 without, and an embedding that nothing adapts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 8), nn.Linear(8, 4, bias=False)])

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embedding(rows)
        for block in self.blocks:
            x = block(x)
        return x


def model(kind: str) -> nn.Module:
    """Return a model of a kind, whose numbers are of no account."""
    made = Model().bfloat16() if kind == "bfloat16" else Model()
    replace_linear_with_lora(made, 3, 1.5)
    if kind in ("nf4", "fp4", "int8"):
        quantise_(made, kind, block_size=32)
    return made


def described(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return dtype and shape of each tensor; the text of one that is JSON."""
    return {
        key: bytes(t.tolist()).decode()
        if TEXT in key
        else " ".join(map(str, (str(t.dtype).removeprefix("torch."), *t.shape)))
        for key, t in tensors.items()
    }


def today() -> dict[str, dict]:
    """Return what is written now, by kind of file."""
    found: dict[str, dict] = {kind: described(model(kind).state_dict()) for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model("plain"), Path(folder, "a"), modules_to_save=["embedding"])
        save_peft_adapter(model("plain"), folder)
        found["adapter"] = _of_file(Path(folder, "a"))
        found["peft"] = _of_file(Path(folder, "adapter_model.safetensors"))
        found["peft"]["config"] = json.loads(Path(folder, "adapter_config.json").read_text())
    return found


def _of_file(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        metadata = file.metadata()
        for key, value in metadata.items():
            if value.startswith("{\n"):
                metadata[key] = "what adapter_config.json holds"
        return {"metadata": metadata, "tensors": described(tensors)}


def tensors_of(entry: dict[str, str]) -> dict[str, Tensor]:
    """Return tensors of the keys, dtypes and shapes of an entry, with numbers of a fixed seed."""
    torch.manual_seed(0)
    found = {}
    for key, told in entry.items():
        if told.startswith("{"):
            found[key] = torch.tensor(list(told.encode()), dtype=torch.uint8)
            continue
        name, *sizes = told.split()
        dtype, shape = getattr(torch, name), list(map(int, sizes))
        if dtype.is_floating_point:
            found[key] = torch.rand(shape).sub(0.3).to(dtype)
        else:
            low, high = (0, 1) if not shape else (-127, 128) if name == "int8" else (0, 256)
            found[key] = torch.randint(low, high, shape, dtype=dtype)
    return found


if __name__ == "__main__":
    print(json.dumps(today(), indent=1))
