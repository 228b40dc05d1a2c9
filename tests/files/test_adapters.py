"""Adapters as files: what is saved comes back."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

from lora_ext import (
    LinearWithLoRA,
    load_adapter,
    lora_state_dict,
    replace_linear_with_lora,
    save_adapter,
)
from tests.layers.test_inject import TOKENS, ToyLM, names_of, randomise


def base_model():
    torch.manual_seed(11)
    return ToyLM()


def adapted_model():
    model = base_model()
    replace_linear_with_lora(model, 3, 2.0, scaling="alpha/rank")
    randomise(model)
    return model


@pytest.fixture
def saved(tmp_path) -> tuple[nn.Module, Path]:
    model = adapted_model()
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    return model, path


@pytest.mark.parametrize("fresh", [True, False], ids=["plain_model", "adapted_model"])
def test_saved_adapter_comes_back(saved, fresh):
    model, path = saved
    other = base_model() if fresh else adapted_model()
    state = torch.get_rng_state()
    load_adapter(other, str(path))
    assert torch.equal(torch.get_rng_state(), state), "loading drew random numbers"
    assert names_of(other) == names_of(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.head.weight is other.embed.weight
    lora = other.blocks[0].up.lora
    assert (lora.rank, lora.alpha, lora.scaling) == (3, 2.0, "alpha/rank")
    assert lora.A.requires_grad and lora.A.is_leaf


def test_file_holds_the_adapters_alone(saved):
    model, path = saved
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert keys == set(lora_state_dict(model)) and len(keys) == 10
    assert {k: json.loads(metadata[k]) for k in ("rank", "alpha", "scaling")} == {
        "rank": 3,
        "alpha": 2.0,
        "scaling": "alpha/rank",
    }
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask())
    assert os.listdir(path.parent) == [path.name], "a temporary file is left"


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_each_layer_keeps_its_rank_and_scaling(tmp_path):
    model = base_model()
    replace_linear_with_lora(model, 3, 2.0, target_modules=["up"])
    replace_linear_with_lora(model, 5, 4, target_modules=["head"], scaling="alpha/sqrt(rank)")
    replace_linear_with_lora(model, 1, 0.5, target_modules=["0.down"])
    randomise(model)
    save_adapter(model, tmp_path / "a")
    other = base_model()
    load_adapter(other, tmp_path / "a")
    assert names_of(other) == names_of(model)
    assert [other.get_submodule(n).lora.rank for n in names_of(other)] == [3, 1, 3, 5]
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_adapters_comes_back(tmp_path, adapter):
    model = base_model().to(torch.bfloat16)
    replace_linear_with_lora(model, 3, 2.0, dtype=adapter)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    other = base_model().to(torch.bfloat16)
    load_adapter(other, tmp_path / "a")
    assert other.head.lora.A.dtype == adapter
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_modules_to_save_come_back_whole(tmp_path):
    model = adapted_model()
    nn.init.normal_(model.blocks[0].norm.weight)
    save_adapter(model, tmp_path / "a", modules_to_save=["blocks.0.norm"])
    other = base_model()
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other.blocks[0].norm.weight, model.blocks[0].norm.weight)
    assert torch.equal(other(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match="modules_to_save must name modules .* no 'blocks.7'"):
        save_adapter(model, tmp_path / "b", modules_to_save=["blocks.7"])
    assert not (tmp_path / "b").exists()


def test_shared_linear_gets_its_adapter_in_every_place(tmp_path):
    def make():
        torch.manual_seed(2)
        shared = nn.Linear(12, 12)
        return nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))

    model = make()
    replace_linear_with_lora(model, 3, 2.0)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    other = make()
    load_adapter(other, tmp_path / "a")
    x = torch.randn(4, 12)
    assert other[2][0] is other[0] and torch.equal(other(x), model(x))


def test_adapter_of_a_single_layer(tmp_path):
    layers = [LinearWithLoRA(nn.Linear(4, 3), 2, 1.0) for _ in range(2)]
    nn.init.normal_(layers[0].lora.B)
    save_adapter(layers[0], tmp_path / "a")
    load_adapter(layers[1], tmp_path / "a")
    assert torch.equal(layers[1].lora.B, layers[0].lora.B)


def test_state_dict_of_the_adapters():
    model = adapted_model()
    adapters = lora_state_dict(model)
    assert all(key.endswith(("lora.A", "lora.B")) for key in adapters)
    only = lora_state_dict(model, "lora_only")
    assert set(only) - set(adapters) == {f"blocks.{i}.up.linear.bias" for i in (0, 1)}
    every = lora_state_dict(model, "all")
    assert set(every) - set(only) == {f"blocks.{i}.norm.bias" for i in (0, 1)}
    other = adapted_model()
    assert not other.load_state_dict(adapters, strict=False).unexpected_keys
    assert torch.equal(other(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match="bias must be 'none', 'lora_only' or 'all', got 'x'"):
        lora_state_dict(model, "x")
    with pytest.raises(ValueError, match="model must have LinearWithLoRA layers"):
        lora_state_dict(base_model())


def test_adapted_module_to_save_loads_into_a_fresh_model(tmp_path):
    """The file has the keys of the adapted head, and the fresh model a plain one."""
    model = adapted_model()
    model.head.linear.weight = nn.Parameter(torch.randn(20, 12))  # untied and trained
    for names in (["head"], ["head.linear"], ["head", "blocks.1", "head.lora", "head"]):
        save_adapter(model, tmp_path / "a", modules_to_save=names)
        other = base_model()
        other.head.weight = nn.Parameter(torch.zeros(20, 12))
        load_adapter(other, tmp_path / "a")
        assert torch.equal(other(TOKENS), model(TOKENS)), names
        load_adapter(other, tmp_path / "a")  # adapted by now
        assert torch.equal(other(TOKENS), model(TOKENS)), names


def test_shared_module_to_save_comes_back_under_both_names(tmp_path):
    def make():
        shared = nn.Linear(12, 12)
        return nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), nn.Linear(12, 12))

    model = make()
    replace_linear_with_lora(model, 3, 2.0, target_modules=["0"])
    replace_linear_with_lora(model, 2, 2.0, target_modules=["3"])
    randomise(model)
    save_adapter(model, tmp_path / "a", modules_to_save=["2", "3"])
    other = make()
    load_adapter(other, tmp_path / "a")
    x = torch.randn(4, 12)
    assert other[2][0] is other[0] and torch.equal(other(x), model(x))


def test_modules_to_save_are_names_of_tensors(tmp_path):
    class WithState(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(12, 12), WithState(12, 12))
    replace_linear_with_lora(model, 3, 2.0)
    with pytest.raises(ValueError, match="must name modules of tensors, 1._extra_state is none"):
        save_adapter(model, tmp_path / "a", modules_to_save=["1"])
    with pytest.raises(TypeError, match="modules_to_save must hold strings, got int"):
        save_adapter(model, tmp_path / "a", modules_to_save=[1])
    assert os.listdir(tmp_path) == []


def test_meta_model_is_refused(tmp_path):
    """Loading would look as if it had worked, with the values gone."""
    save_adapter(adapted_model(), tmp_path / "a")
    with torch.device("meta"):
        model = ToyLM()
    with pytest.raises(ValueError, match="lora.A can't be loaded: the model's is on the meta dev"):
        load_adapter(model, tmp_path / "a")
    assert names_of(model) == []


def test_loading_runs_no_property_of_the_model(tmp_path):
    class WithProperty(ToyLM):
        @property
        def danger(self):
            raise RuntimeError("a file's key ran this")

    layer = nn.ModuleDict({"danger": nn.Linear(12, 12)})
    replace_linear_with_lora(layer, 3, 2.0)
    save_adapter(layer, tmp_path / "a")
    with pytest.raises(ValueError, match="danger must be a linear layer, the model has no such mo"):
        load_adapter(WithProperty(), tmp_path / "a")


def test_loading_in_threads_leaves_the_random_numbers_alone(saved):
    """While others draw: what they draw is what they would have drawn alone."""
    model, path = saved
    torch.manual_seed(3)
    want = torch.stack([torch.rand(8) for _ in range(200)])
    torch.manual_seed(3)
    got, models = [], [base_model() for _ in range(8)]
    torch.manual_seed(3)

    def draw():
        for _ in range(200):
            got.append(torch.rand(8))

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(draw), *(pool.submit(load_adapter, other, path) for other in models)]
        for job in jobs:
            job.result()
    assert torch.equal(torch.stack(got), want)
    assert all(torch.equal(other(TOKENS), model(TOKENS)) for other in models)


@pytest.mark.parametrize("save", [save_adapter, lambda model, path: lora_state_dict(model)])
def test_a_layer_whose_factors_have_other_names_is_refused_and_not_left_out(saved, tmp_path, save):
    model, path = saved
    before = path.read_bytes()
    prune.l1_unstructured(model.blocks[0].up.lora, "A", 0.5)
    with pytest.raises(ValueError, match="have blocks.0.up.lora.A in its state_dict, .*pruning"):
        save(model, path)
    assert path.read_bytes() == before
    prune.remove(model.blocks[0].up.lora, "A")
    save(model, path)
