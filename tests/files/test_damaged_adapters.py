"""A damaged adapter file is refused with the reason, and the model is as it was, bit for bit."""

import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ext import load_adapter, merge_, replace_linear_with_lora, save_adapter
from tests.files.test_adapters import adapted_model, base_model
from tests.layers.test_inject import assert_unchanged, snapshot


@pytest.fixture
def path(tmp_path):
    """An intact adapter file."""
    save_adapter(adapted_model(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def damage(change):
    """Rewrite the file with tensors and metadata changed in place by `change`."""

    def rewrite(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return rewrite


def tensor(name, make):
    return damage(lambda tensors, _: tensors.update({name: make(tensors.get(name))}))


def entry(**values):
    return damage(lambda _, metadata: metadata.update(values))


def without(name):
    return damage(lambda tensors, metadata: (tensors.pop(name, 0), metadata.pop(name, 0)))


A, B = "blocks.0.up.lora.A", "blocks.0.up.lora.B"
DAMAGED = {
    "empty": (lambda path: path.write_bytes(b""), "must be a safetensors file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "must be a safetensors file"),
    "header_cut": (lambda p: p.write_bytes(p.read_bytes()[:40]), "must be a safetensors file"),
    "garbage": (lambda path: path.write_bytes(os.urandom(999)), "must be a safetensors file"),
    "pickle": (lambda path: torch.save({"a": torch.ones(1)}, path), "must be a safetensors file"),
    "foreign": (lambda path: save_file({"w": torch.ones(1)}, path), "must be a file of save_adap"),
    "version": (entry(version="2"), "adapter of version 1, got version 2"),
    "no_version": (without("version"), "adapter of version 1, got version None"),
    "rank_no_json": (entry(rank="three"), "the adapter file's rank is damaged"),
    "rank_nested": (entry(rank="[" * 9999), "the adapter file's rank is damaged"),
    "rank_missing": (without("rank"), "entry for .* is damaged: rank must be an integer"),
    "rank_zero": (entry(rank="0"), "entry for .* is damaged: rank must be at least 1, got 0"),
    "rank_huge": (entry(rank="1000000000000"), "1000000000000"),
    "rank_wrong": (entry(rank="4"), "4"),
    "rank_of_others": (entry(rank='{"head": 3}'), "entry for .* is damaged: rank must be"),
    "rank_list": (entry(rank="[3]"), "entry for .* is damaged: rank must be an integer, got list"),
    "alpha_nan": (entry(alpha="NaN"), "entry for .* is damaged: alpha must be finite, got nan"),
    "alpha_infinite": (entry(alpha="1e999"), "is damaged: alpha must be finite, got inf"),
    "alpha_long": (entry(alpha="9" * 400), "the adapter file's entry for .* is damaged"),
    "alpha_text": (entry(alpha='"2"'), "is damaged: alpha must be a number, got str"),
    "scaling": (entry(scaling='"beta"'), "is damaged: scaling must be one of"),
    "scaling_list": (entry(scaling="[1]"), "the adapter file's entry for .* is damaged"),
    "extra_no_list": (entry(modules_to_save="5"), "modules_to_save must be names, got 5"),
    "extra_null": (entry(modules_to_save="null"), "modules_to_save must be names, got None"),
    "extra_unknown": (entry(modules_to_save='["lm"]'), "modules_to_save must name .* no 'lm'"),
    "shape_A": (tensor(A, lambda t: torch.ones(13, 3)), rf"{A} must have shape \(12, 3\), the fil"),
    "shape_B": (tensor(B, lambda t: torch.ones(3, 25)), rf"{B} must have shape \(3, 24\), the fil"),
    "dims": (
        tensor(A, lambda t: t.flatten()),
        rf"{A} must have shape \(12, 3\), the file has \(36",
    ),
    "dtype_A": (tensor(A, lambda t: t.long()), rf"{A} must have .*dtype"),
    "dtype_B": (tensor(B, lambda t: t.half()), rf"{B} must have dtype torch.float32, the file has"),
    "half_over_float": (
        damage(lambda ts, _: ts.update({k: t.bfloat16() for k, t in ts.items()})),
        r"lora.A must have .*dtype torch.float32, the file has torch.bfloat16",
    ),
    "missing_A": (without(A), "blocks.0.up"),
    "missing_B": (without(B), f"the adapter file lacks {B}"),
    "extra_tensor": (tensor("blocks.0.up.lora.C", lambda t: torch.ones(1)), "that fit nowhere: bl"),
    "extra_layer": (
        damage(
            lambda ts, _: ts.update({"tail.lora.A": ts[A].clone(), "tail.lora.B": ts[B].clone()})
        ),
        "tail must be a linear layer, the model has no such module",
    ),
    "no_linear": (
        damage(lambda ts, _: ts.update({"embed.lora.A": ts[A].clone()})),
        "embed must be a linear layer, the model has a Embedding",
    ),
    "two_dots": (
        damage(lambda ts, _: ts.update({"0..lora.A": ts[A].clone(), "0..lora.B": ts[B].clone()})),
        "0. must be a linear layer, the model has no such module",
    ),
    "no_name": (
        damage(lambda ts, _: ts.update({"lora.A": ts[A].clone(), "lora.B": ts[B].clone()})),
        "model must be a linear layer, the model has a ToyLM",
    ),
    "tied_apart": (
        damage(
            lambda ts, metadata: (
                metadata.update(modules_to_save='["embed", "head"]'),
                ts.update({"embed.weight": torch.ones(20, 12)}),
                ts.update({"head.linear.weight": torch.zeros(20, 12)}),
            )
        ),
        "must equal .*, they are the same tensor in the model",
    ),
    "no_tensor": (damage(lambda tensors, _: tensors.clear()), "at least one adapter"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["plain_model", "adapted_model"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_refused_and_the_model_unchanged(path, kind, fresh):
    rewrite, message = DAMAGED[kind]
    rewrite(path)
    model = base_model() if fresh else adapted_model()
    before = snapshot(model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


LONG = "x" * 5000
TALKATIVE = {
    "version": entry(version=LONG),
    "rank": entry(rank=LONG),
    "rank_text": entry(rank=f'"{LONG}"'),
    "rank_negative": entry(rank="-" + "9" * 4000),
    "rank_of_a_long_name": damage(
        lambda ts, metadata: (ts.update({f"{LONG}.lora.A": ts[A].clone()}), metadata.pop("rank"))
    ),
    "alpha": entry(alpha=f"[{LONG!r}]".replace("'", '"')),
    "scaling": entry(scaling=f'"{LONG}"'),
    "scaling_list": entry(scaling=f'["{LONG}"]'),
    "extra": entry(modules_to_save=f'{{"{LONG}": 1}}'),
    "extra_name": entry(modules_to_save=f'["{LONG}"]'),
    "extra_nested": entry(modules_to_save="[" * 400 + "]" * 400),
    "layer": tensor(f"{LONG}.lora.A", lambda t: torch.ones(1)),
    "unknown": damage(lambda ts, _: ts.update({f"{LONG}{i}": torch.ones(1) for i in range(9)})),
    "terminal": tensor("\x1b[2J\n\x07" * 900, lambda t: torch.ones(1)),
    "shape": tensor(A, lambda t: torch.ones([1] * 2000)),
    "header": lambda path: path.write_bytes(
        (len(LONG) + 99).to_bytes(8, "little") + b'{"a":{"dtype":"' + LONG.encode() + b" " * 84
    ),
}


@pytest.mark.parametrize("kind", TALKATIVE)
def test_message_shows_little_of_the_file(path, kind):
    """At most 200 characters of it, next to 200 of ours, and nothing that steers a terminal."""
    TALKATIVE[kind](path)
    path = path.rename(path.parent.parent / "a")  # a short name: it is in the message too
    for model in (base_model(), adapted_model()):
        with pytest.raises(ValueError) as caught:
            load_adapter(model, path)
        message = str(caught.value).replace(str(path), "")
        assert len(message) <= 400 and message.isprintable()
        assert message.count("x") <= 200 + 9 and message.count("9") <= 200


def test_huge_ranks_take_no_memory(tmp_path):
    """A rank that the header claims and the tensors do not have is refused before it costs."""
    model = base_model()
    path = tmp_path / "a"
    metadata = {"format": "lora_ext.adapter", "version": "1", "alpha": "1", "scaling": '"alpha"'}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rank in (10**8, 10**12, 10**400):
        tensors = {"head.lora.A": torch.ones(12, 3), "head.lora.B": torch.ones(3, 20)}
        save_file(tensors, path, metadata | {"rank": str(rank)})
        with pytest.raises(ValueError, match="lora.A must have shape"):
            load_adapter(model, path)
    header = b'{"a.lora.A":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_adapter(model, path)
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_adapter(model, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB


def test_file_that_fits_another_model_is_refused(path):
    other = base_model()
    replace_linear_with_lora(other, 3, 2.0)  # the other scaling
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"must have rank, alpha, scaling \(3, 2.0, 'alpha/rank'"):
        load_adapter(other, path)
    assert_unchanged(other, before)
    with pytest.raises(ValueError, match="must be a linear layer, the model has no such module"):
        load_adapter(nn.Sequential(nn.Linear(12, 12)), path)
    with pytest.raises(TypeError, match="model must be an nn.Module, got NoneType"):
        load_adapter(None, path)
    with pytest.raises(FileNotFoundError, match="there is none at .*nowhere"):
        load_adapter(other, path.parent / "nowhere")
    merged = adapted_model()
    merge_(merged)
    with pytest.raises(ValueError, match=r"is merged: call unmerge_\(model\) before loading"):
        load_adapter(merged, path)


def test_model_with_more_layers_than_the_file_is_refused(tmp_path):
    model = base_model()
    replace_linear_with_lora(model, 3, 2.0, target_modules=["up"])
    save_adapter(model, tmp_path / "a")
    other = base_model()
    replace_linear_with_lora(other, 3, 2.0)
    with pytest.raises(ValueError, match="lacks layers that the model has: blocks.0.down, "):
        load_adapter(other, tmp_path / "a")


@pytest.mark.parametrize("more, ends", [(5, "4.lora.C'?$"), (7, "4.lora.C'? and 2 more$")])
def test_five_names_are_shown_and_the_others_counted(path, more, ends):
    names = [f"blocks.{number}.lora.C" for number in range(more)]
    damage(lambda tensors, _: tensors.update({name: torch.ones(1) for name in names}))(path)
    with pytest.raises(ValueError, match=f"that fit nowhere: .*{ends}"):
        load_adapter(adapted_model(), path)
