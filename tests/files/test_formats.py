"""Checkpoints of this version, by formats.json: they are written so, and load into what they say.

What a loaded model gives is worked out here from the file's tensors by their keys.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_ext import (
    group_,
    load_adapter,
    load_peft_adapter,
    lora_state_dict,
    merge_,
    prepack_,
)
from lora_ext.testing import replace_linear_with_lora as replace_plain
from tests.files.formats import FILE, KINDS, Model, model, tensors_of, today

FORMATS = json.loads(FILE.read_text())
ROWS = torch.tensor([[0, 1, 2], [4, 3, 3]])
# Dettmers et al., arXiv:2305.14314, appendix E; and sign, exponent and mantissa of FP4 by 12.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
VALUES = {"nf4": NF4, "fp4": FP4 + [-n for n in FP4]}


def weight_of(state: dict[str, Tensor], linear: str, shape: tuple[int, int]) -> Tensor:
    """Return what a linear's entries stand for, (out, in), in float64."""
    data = state[f"{linear}.weight"]
    if data.dtype is torch.int8:
        return data.double() * state[f"{linear}.SCB"][:, None].double() / 127
    if data.dtype is not torch.uint8:
        return data.double()
    (told,) = (key for key in state if key.startswith(f"{linear}.weight.quant_state."))
    values = torch.tensor(VALUES[told.rpartition("__")[2]], dtype=torch.float64)
    codes = torch.stack((data >> 4, data & 15), -1).flatten().int()
    scales = state[f"{linear}.weight.absmax"].double().repeat_interleave(32)
    return (values[codes] * scales).view(shape)


def expected(state: dict[str, Tensor], adapter: dict[str, Tensor] | None = None) -> Tensor:
    """Return what the model gives for ROWS, in float64, by the keys of its state."""
    low = state if adapter is None else adapter
    x = low.get("embedding.weight", state["embedding.weight"]).double()[ROWS]
    for name, shape in (("blocks.0", (8, 16)), ("blocks.1", (4, 8))):
        y = x @ weight_of(state, f"{name}.linear", shape).T
        y += state.get(f"{name}.linear.bias", torch.zeros(())).double()
        x = y + 1.5 * (x @ low[f"{name}.lora.A"].double() @ low[f"{name}.lora.B"].double())
    return x


def assert_gives(made: nn.Module, want: Tensor) -> None:
    y = made(ROWS)
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=16 * eps, atol=16 * eps * want.abs().max())
    assert not torch.allclose(want, torch.zeros_like(want))


def test_todays_files_are_those_of_the_list():
    """A key, shape, dtype or field that changes its name makes files of before unreadable."""
    assert today() == FORMATS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["torch", "safetensors"])
def test_checkpoint_of_this_version_loads(tmp_path, kind, file):
    state = tensors_of(FORMATS[kind])
    if file == "torch":
        torch.save({"model": state, "epoch": 3}, tmp_path / "a")
        loaded = torch.load(tmp_path / "a", weights_only=True)["model"]
    else:
        save_file(state, tmp_path / "a")
        loaded = load_file(tmp_path / "a")
    made = model(kind)
    made.load_state_dict(loaded, strict=True)
    assert_gives(made, expected(state))
    written = made.state_dict()
    for key in FORMATS[kind].keys() - {k for k in state if k.endswith("quant_map")}:
        assert torch.equal(written[key], state[key]), key
    if kind in VALUES:
        assert written["blocks.0.linear.weight.quant_map"].tolist() == pytest.approx(VALUES[kind])


@pytest.mark.parametrize("change", [group_, prepack_, merge_], ids=lambda f: f.__name__)
def test_changed_models_have_the_same_checkpoint(change):
    made = model("plain")
    made.load_state_dict(tensors_of(FORMATS["plain"]))
    made.requires_grad_(False)
    change(made)
    for key, value in tensors_of(FORMATS["plain"]).items():
        assert torch.equal(made.state_dict()[key], value)
    assert list(made.state_dict()) == list(FORMATS["plain"])


def test_plain_classes_write_and_read_the_same_checkpoint(tmp_path):
    plain, state = Model(), tensors_of(FORMATS["plain"])
    replace_plain(plain, 3, 1.5)
    plain.load_state_dict(state, strict=True)
    assert_gives(plain, expected(state))
    torch.save(plain.state_dict(), tmp_path / "a")
    made = model("plain")
    made.load_state_dict(torch.load(tmp_path / "a", weights_only=True), strict=True)
    assert_gives(made, expected(state))


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "adapted"])
def test_adapter_file_of_this_version_loads(tmp_path, fresh):
    entry, state = FORMATS["adapter"], tensors_of(FORMATS["plain"])
    adapter = {key: value * 0.5 for key, value in tensors_of(entry["tensors"]).items()}
    save_file(adapter, tmp_path / "a", entry["metadata"])
    made = base(state) if fresh else model("plain")
    if not fresh:
        made.load_state_dict(state)
    load_adapter(made, tmp_path / "a")
    assert_gives(made, expected(state, adapter))
    assert list(lora_state_dict(made)) == [key for key in adapter if "lora" in key]


def test_peft_folder_of_this_version_loads(tmp_path):
    entry, state = FORMATS["peft"], tensors_of(FORMATS["plain"])
    theirs = tensors_of(entry["tensors"])
    save_file(theirs, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(entry["config"]))
    load_peft_adapter(made := base(state), tmp_path)
    ours = {
        f"{key.split('lora_')[0].removeprefix('base_model.model.')}lora.{key[-8]}": value.T
        for key, value in theirs.items()
    }
    assert_gives(made, expected(state, ours))


def base(state: dict[str, Tensor]) -> nn.Module:
    """Return the model that nothing has adapted, with the weights of a state."""
    made = Model()
    made.load_state_dict(
        {k.replace(".linear.", "."): v for k, v in state.items() if "lora" not in k}
    )
    return made
