"""Damage adapter files at random: each is refused with the model as it was, or loads what it holds.

    python -m tests.files.corruptions --cases 5000 --seed 0

What it holds is read by `raw_tensors`, which shares no code with lora_ext or safetensors.
"""

import argparse
import copy
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_ext import (
    LinearWithLoRA,
    load_adapter,
    load_peft_adapter,
    replace_linear_with_lora,
    save_adapter,
    save_peft_adapter,
)

ALLOWED = (ValueError, OSError)  # as documented; TypeError is for a model of the wrong type
NUMPY = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "I64": np.int64, "U8": np.uint8}


def base_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 7, bias=False)))


def adapted_model() -> nn.Module:
    model = base_model()
    replace_linear_with_lora(model, 2, 3.0, target_modules=["0"], scaling="alpha/rank")
    replace_linear_with_lora(model, 3, 8, target_modules=["2.0"], scaling="alpha/rank")
    for layer in (model[0], model[2][0]):
        nn.init.normal_(layer.lora.B)
    return model


def raw_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def raw_file(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def raw_tensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file with json and numpy alone."""
    header, body = raw_header(data)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[key] = np.frombuffer(body[start:end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


JUNK = [None, True, -1, 0, 1, 2, 3, 8, 1e999, 1e-320, 2**63, 10**400, "", "x", "alpha", "0", [], {}]
JUNK += ["alpha/rank", "alpha/sqrt(rank)", [1], {"0": 2}, {"2.0": 3}, {"": {}}, "\ud800", "é" * 300]
JUNK += [["0"], ["2"], ["2.0", "0"], ["1"], ["2..0"], [[[]]], {"(.+)+!": 2}, {"a{9999999999}": 2}]
KEYS = [
    "0..lora.A",
    "lora.A",
    ".lora.A",
    "2.lora.A",
    "1.lora.A",
    "0.lora.C",
    "2.0.linear.weight",
    "",
]


def damage_bytes(random: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or overwrite some bytes, mostly of the header."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 40))):
        at = (
            random.randrange(min(len(changed), random.choice((8, 200, 800, 10**6))))
            if changed
            else 0
        )
        length = random.choice((1, 1, 4, 32))
        match random.randrange(6):
            case 0 if changed:
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at : at + length] = random.randbytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4 if changed:
                changed[at] = random.choice(b'0123456789{}[]",:.-\\\x00\xff')
            case 5 if random.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def damage_header(random: random.Random, data: bytes) -> bytes:
    """Change a well-formed file: names, shapes, dtypes, places and metadata."""
    header, body = raw_header(data)
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(random.choice((1, 1, 2, 3))):
        key = random.choice(keys)
        entry = header.get(key, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        match random.randrange(8):
            case 0:
                header[random.choice(KEYS)] = header.pop(key, entry)
            case 1:
                entry["dtype"] = random.choice(
                    (*NUMPY, "BF16", "F8_E4M3", "F4", "BOOL", "C64", "?")
                )
            case 2:
                entry["shape"] = random.choice(
                    (entry["shape"][::-1], [], [0], [1] * 70, [2**62, 4], [30], [-1], "x")
                )
            case 3:
                other = header.get(random.choice(keys), entry)
                entry["data_offsets"], other["data_offsets"] = (
                    other["data_offsets"],
                    entry["data_offsets"],
                )
            case 4:
                header.pop(key, None)
            case 5 | 6:
                field = random.choice(("rank", "alpha", "scaling", "modules_to_save", "version"))
                text = json.dumps(random.choice(JUNK))
                header["__metadata__"][field] = random.choice((text, text[:-1], "[" * 5000, text))
            case 7:
                name = random.choice(("0", "2", "2.0", "1"))
                header["__metadata__"]["modules_to_save"] = json.dumps([name])
    return raw_file(header, body)


def damage_config(random: random.Random, text: bytes) -> bytes:
    """Change fields of an adapter_config.json, or its bytes."""
    if random.random() < 0.2:
        return damage_bytes(random, text)
    config = json.loads(text)
    for _ in range(random.choice((1, 1, 2, 3))):
        fields = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", *config]
        config[random.choice(fields)] = random.choice(JUNK)
    return json.dumps(config).encode()


def state_of(model: nn.Module) -> list[Any]:
    """Return all that a refused file may not have changed, bit for bit."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [
        (key, id(value), value.dtype, value.detach().numpy().tobytes())
        for key, value in model.state_dict(keep_vars=True).items()
    ]
    return [modules, tensors]


def assert_holds(got: Tensor, want: np.ndarray) -> None:
    assert got.detach().numpy().tobytes() == np.ascontiguousarray(want).tobytes()


def check_loaded(model: nn.Module, data: bytes) -> None:
    """Hold a model against the file that it has loaded."""
    tensors, metadata = raw_tensors(data)
    state = model.state_dict()
    for key, want in tensors.items():
        assert_holds(state[key], want)
    for name, layer in model.named_modules():
        if isinstance(layer, LinearWithLoRA):
            for field in ("rank", "alpha", "scaling"):
                value = json.loads(metadata[field])
                value = value[name] if isinstance(value, dict) else value
                assert getattr(layer.lora, field) == value


def check_loaded_peft(model: nn.Module, data: bytes, text: bytes) -> None:
    tensors, _ = raw_tensors(data)
    config = json.loads(text)
    for key, want in tensors.items():
        name, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        lora = model.get_submodule(name).lora
        assert_holds(getattr(lora, factor[0]), want.T)
        for field, default, value in (
            ("rank_pattern", "r", lora.rank),
            ("alpha_pattern", "lora_alpha", lora.alpha),
        ):
            patterns = config.get(field) or {}
            hits = [v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)]
            assert value == (hits[0] if hits else patterns.get(name, config.get(default)))
        rule = "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
        assert lora.scaling == rule


def run(cases: int, seed: int) -> Counter[str]:
    """Try `cases` damaged files; return how often what came of it. An AssertionError names one."""
    results: Counter[str] = Counter()
    base, adapted = base_model(), adapted_model()
    with tempfile.TemporaryDirectory() as name:
        file, folder = Path(name, "a"), Path(name, "p")
        save_adapter(adapted, file, modules_to_save=["0"])
        save_peft_adapter(adapted, folder)
        config, peft_tensors = (
            folder / "adapter_config.json",
            folder / "adapter_model.safetensors",
        )
        whole = {path: path.read_bytes() for path in (file, config, peft_tensors)}
        kinds: list[tuple[Path, Callable[[random.Random, bytes], bytes]]] = [
            (file, damage_bytes),
            (file, damage_header),
            (config, damage_config),
            (peft_tensors, damage_bytes),
            (peft_tensors, damage_header),
        ]
        for case in range(seed, seed + cases):
            chance = random.Random(case)
            path, damage = chance.choice(kinds)
            path.write_bytes(damage(chance, whole[path]))
            model = copy.deepcopy(chance.choice((base, adapted)))
            before = state_of(model)
            what = f"case {case} ({path.name}, {damage.__name__})"
            try:
                try:
                    (load_adapter if path == file else load_peft_adapter)(
                        model, file if path == file else folder
                    )
                except ALLOWED as error:
                    results[f"{path.name}: refused"] += 1
                    assert state_of(model) == before, "refused, and the model has changed"
                    message = str(error).replace(str(path), "").replace(str(folder), "")
                    assert len(message) <= 450 and message.isprintable(), message
                else:
                    results[f"{path.name}: loaded"] += 1
                    if path == file:
                        check_loaded(model, path.read_bytes())
                    else:
                        check_loaded_peft(model, peft_tensors.read_bytes(), config.read_bytes())
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            path.write_bytes(whole[path])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for what, count in sorted(run(arguments.cases, arguments.seed).items()):
        print(f"{what} {count}")
    print(f"{arguments.cases} damaged files, seeds from {arguments.seed}: no finding")


if __name__ == "__main__":
    main()
