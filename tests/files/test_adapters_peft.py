"""Adapters to and from PEFT's layout, each way checked by PEFT itself; checkpoints of the book."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ext import (
    LinearWithLoRA,
    load_peft_adapter,
    replace_linear_with_lora,
    save_peft_adapter,
)
from lora_ext.testing import replace_linear_with_lora as replace_plain
from tests.layers.test_inject import assert_unchanged, names_of, randomise, snapshot
from tests.training import MLP, batches, make_models

X = batches()[0][0].double()
SCALINGS = ["alpha", "alpha/rank", "alpha/sqrt(rank)"]


def base_model():
    torch.manual_seed(6)
    return MLP().double()


def adapted(*calls):
    model = base_model()
    for rank, alpha, options in calls:
        replace_linear_with_lora(model, rank, alpha, **options)
    randomise(model)
    return model


MODELS = {
    **{scaling: [(4, 3, {"scaling": scaling})] for scaling in SCALINGS},
    "one_layer": [(4, 3, {"target_modules": ["1.down"]})],
    "two_ranks": [
        (2, 8.0, {"target_modules": ["up"], "scaling": "alpha/rank"}),
        (5, 7.5, {"target_modules": ["1.down"], "scaling": "alpha/rank"}),
        (3, 8.0, {"target_modules": ["0.down", "head"], "scaling": "alpha/rank"}),
    ],
    "mixed_scalings": [
        (4, 3.0, {"target_modules": ["up"], "scaling": "alpha/sqrt(rank)"}),
        (4, 3.0, {"target_modules": ["down", "head"]}),
    ],
}


@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_what_we_export(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model = adapted(*MODELS[kind])
    save_peft_adapter(model, tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = peft.PeftModel.from_pretrained(base_model(), tmp_path / "new" / "folder")
    layers = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert layers == names_of(model)
    want = model(X)
    assert not torch.allclose(want, base_model()(X))
    torch.testing.assert_close(theirs(X), want)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(X), want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"target_modules": r".*\.(up|down)", "r": 3, "rank_pattern": {"1.up": 5}},
        {"alpha_pattern": {"head": 3, "blocks.0.*": 5}, "lora_dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("fresh", [True, False], ids=["plain_model", "adapted_model"])
def test_we_load_what_peft_saves(tmp_path, options, fresh):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down", "head"]}
    config = peft.LoraConfig(**config | {"init_lora_weights": False} | options)
    theirs = peft.get_peft_model(base_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = base_model()
    load_peft_adapter(model, tmp_path)
    if not fresh:
        for name in names_of(model):
            nn.init.normal_(model.get_submodule(name).lora.B)
        load_peft_adapter(model, str(tmp_path))
    want = theirs(X)
    assert not torch.allclose(want, base_model()(X))
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("kind", MODELS)
def test_export_and_import_give_the_same_model(tmp_path, kind):
    """Without PEFT. The factors bit for bit, the scale up to a rounding."""
    model = adapted(*MODELS[kind])
    save_peft_adapter(model, tmp_path)
    other = base_model()
    state = torch.get_rng_state()
    load_peft_adapter(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "loading drew random numbers"
    assert names_of(other) == names_of(model)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    for name in names_of(model):
        ours, theirs = (m.get_submodule(name).lora for m in (other, model))
        assert ours.scale == pytest.approx(theirs.scale, rel=1e-15)
        assert ours.A.is_contiguous() and ours.A.is_leaf and ours.A.requires_grad


def test_config_is_the_common_case_where_it_can_be(tmp_path):
    model = adapted((4, 3, {"scaling": "alpha/rank", "dropout": 0.1}))
    save_peft_adapter(model, tmp_path, base_model="some/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down", "head", "up"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["lora_dropout"] == 0.1 and config["base_model_name_or_path"] == "some/model"
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.blocks.0.up.lora_A.weight" in keys and len(keys) == 10


def config_with(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors_with(change):
    def rewrite(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


KEY = "base_model.model.head.lora_A.weight"
BROKEN = {
    "no_config": (
        lambda f: (tensors_with(lambda t: None)(f), (f / "adapter_config.json").unlink()),
        FileNotFoundError,
        "a PEFT adapter's, there is no .*adapter_config",
    ),
    "no_tensors": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "a PEFT adapter's, there is none at .*adapter_model",
    ),
    "no_json": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "must be JSON"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), ValueError, "got 'list'"),
    "garbage": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99),
        ValueError,
        "must be a safetensors file",
    ),
    "loha": (config_with(peft_type="LOHA"), ValueError, "must have peft_type 'LORA', got 'LOHA'"),
    "dora": (config_with(use_dora=True), ValueError, "use_dora=True, which a LinearWithLoRA"),
    "bias": (config_with(bias="all"), ValueError, "bias='all', which a LinearWithLoRA has not"),
    "saved": (config_with(modules_to_save=["head"]), ValueError, "modules_to_save="),
    "rank": (config_with(r=3), ValueError, "must have shape .*the file has"),
    "no_rank": (config_with(r=None), ValueError, "entry for 'blocks.0.*' is damaged: rank must"),
    "alpha": (config_with(lora_alpha="8"), ValueError, "is damaged: alpha must be a number"),
    "pattern": (config_with(rank_pattern={"(": 3}), ValueError, "has a damaged rank_pattern"),
    "pattern_nested": (
        config_with(rank_pattern={"(" * 3000 + ")" * 3000: 2}),
        ValueError,
        "has a damaged rank_pattern: .*: 6000 characters, at most 1000 are read",
    ),
    "pattern_huge": (
        config_with(rank_pattern={"a{99999999999}": 2}),
        ValueError,
        "has a damaged rank_pattern: .*: the repetition number is too large",
    ),
    "pattern_reference": (
        config_with(alpha_pattern={r"(.)\1.*": 2}),
        ValueError,
        "has a damaged alpha_pattern: .*: groupref is not supported, nor are flags",
    ),
    "pattern_value": (
        config_with(rank_pattern={"head": [2]}),
        ValueError,
        "'head' is damaged: rank must be an integer, got list",
    ),
    "rslora": (config_with(use_rslora="no"), ValueError, "has use_rslora='no', which a Linear"),
    "pissa": (config_with(init_lora_weights="pissa_niter_4"), ValueError, "='pissa_niter_4', whi"),
    "integers": (
        tensors_with(lambda t: t.update({KEY: t[KEY].long()})),
        ValueError,
        "must hold LoRA factors of linear layers, got base_model.model.head",
    ),
    "patterns": (config_with(alpha_pattern=3), ValueError, "must hold an object as alpha_pattern"),
    "shape": (
        tensors_with(lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()})),
        ValueError,
        r"head.lora.A must have shape \(16, 4\), the file has \(15, 4\)",
    ),
    "half_a_pair": (tensors_with(lambda t: t.pop(KEY)), ValueError, "lacks|fit nowhere"),
    "embedding": (
        tensors_with(lambda t: t.update({"base_model.model.e.lora_embedding_A": torch.ones(2, 2)})),
        ValueError,
        "must hold LoRA factors of linear layers, got base_model.model.e.lora_embedding_A",
    ),
    "unknown_layer": (
        tensors_with(
            lambda t: t.update(
                {KEY.replace("head", "tail"): t[KEY].clone(), "tail.lora_B.weight": t[KEY].clone()}
            )
        ),
        ValueError,
        "tail must be a linear layer, the model has no such module",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapter_is_refused_and_the_model_unchanged(tmp_path, kind):
    save_peft_adapter(adapted((4, 3, {})), tmp_path)
    change, error, message = BROKEN[kind]
    change(tmp_path)
    model = base_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_peft_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_wrong_models_are_named(tmp_path):
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        load_peft_adapter("model", tmp_path)
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        save_peft_adapter(base_model(), tmp_path)
    with pytest.raises(ValueError, match="model is itself a LinearWithLoRA"):
        save_peft_adapter(LinearWithLoRA(nn.Linear(2, 2), 1, 1.0), tmp_path)
    assert os.listdir(tmp_path) == []


def test_checkpoint_of_the_book_loads_strictly(tmp_path):
    """A model of the plain classes, saved by torch.save, weights and hyperparameters by hand."""
    plain = MLP()
    replace_plain(plain, rank=4, alpha=16)
    for name, parameter in plain.named_parameters():
        if name.endswith("lora.B"):
            nn.init.normal_(parameter)
    torch.save({"model_state_dict": plain.state_dict(), "epoch": 3}, tmp_path / "book.pth")
    ours = make_models()["ours"]
    checkpoint = torch.load(tmp_path / "book.pth", weights_only=True)
    for layer in ours.modules():
        if isinstance(layer, LinearWithLoRA):
            layer.lora.alpha = 16
    ours.load_state_dict(checkpoint["model_state_dict"], strict=True)
    x = batches()[0][0]
    torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4)
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    nn.init.zeros_(plain.head.lora.B)
    plain.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4)
