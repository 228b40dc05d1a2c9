"""Hugging Face's Trainer and Accelerate: a small Llama for a few steps, as with the plain layer."""

import copy

import pytest
import torch
from torch import nn

from lora_ext import mark_only_lora_as_trainable, replace_linear_with_lora
from lora_ext.testing import replace_linear_with_lora as replace_plain
from tests.training import batches, loss_of, make_models

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
accelerate_package = pytest.importorskip("accelerate", reason="needs the package accelerate")

STEPS = 4
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base_model():
    torch.manual_seed(8)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def randomise(model, ending):
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if name.endswith(ending):
            nn.init.normal_(parameter, std=0.2)


def adapted():
    """Return the same model with our layers and with the plain ones, adapters alone trained."""
    ours, plain = base_model(), base_model()
    replace_linear_with_lora(ours, 4, 2.0)
    replace_plain(plain, 4, 2.0)
    randomise(ours, "lora.B")
    plain.load_state_dict(ours.state_dict(), strict=True)
    mark_only_lora_as_trainable(ours)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".lora." in name)
    return ours, plain


def counting():
    """Sixteen sequences that count in threes."""
    rows = (torch.arange(16)[:, None] + 3 * torch.arange(12)) % 32
    return [{"input_ids": row, "labels": row} for row in rows]


def losses_by_trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=counting())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
    ids=["default", "checkpointing_accumulation"],
)
def test_trainer_gives_the_losses_of_the_plain_layer(tmp_path, options):
    ours, plain = adapted()
    start = copy.deepcopy(ours.state_dict())
    want = losses_by_trainer(plain, tmp_path, **options)
    torch.testing.assert_close(
        losses_by_trainer(ours, tmp_path, **options), want, atol=1e-5, rtol=1e-5
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-4, rtol=1e-3)
        assert torch.equal(value, start[name]) == (".lora." not in name), name


def test_trainer_saves_and_resumes(tmp_path):
    """Checkpoints hold the keys of the plain classes; a run cut in two ends as the whole one."""
    ours, _ = adapted()
    whole = copy.deepcopy(ours)
    want = losses_by_trainer(whole, tmp_path / "whole", lr_scheduler_type="constant")
    options = {"lr_scheduler_type": "constant", "save_steps": 2, "report_to": []}
    options |= {"logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    options |= {"use_cpu": True, "disable_tqdm": True, "seed": 1, "max_steps": STEPS}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "cut"), **options)
    fresh = adapted()[0]
    first = transformers.Trainer(model=ours, args=arguments, train_dataset=counting())
    first.train()
    again = transformers.Trainer(model=fresh, args=arguments, train_dataset=counting())
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    losses = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(losses), want)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value)


def test_trainer_gives_the_losses_of_peft_where_it_is_accelerated(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    from lora_ext.integrations.peft import accelerate

    models = []
    for _ in range(2):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        models.append(peft.get_peft_model(base_model(), config))
        randomise(models[-1], "lora_B.default.weight")
    report = accelerate(models[0])
    assert len(report.accelerated) == 8 and not report.left
    ours, theirs = (losses_by_trainer(model, tmp_path) for model in models)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name], value, atol=1e-4, rtol=1e-3)


@pytest.fixture
def fresh_accelerate():
    """Let each test choose its precision: Accelerate keeps one a process."""
    reset = accelerate_package.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield
    reset(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_like_the_plain_layer(fresh_accelerate, precision):
    """Prepared, accumulating over two batches, clipped: by the error rule over the run."""
    accelerator = accelerate_package.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    results = {}
    for name, model in make_models().items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)  # float64 is left alone by bf16
        losses = []
        for x, target in batches():
            with accelerator.accumulate(model):
                loss = loss_of(model, x, target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach().double())
        state = accelerator.unwrap_model(model).state_dict()
        results[name] = {"losses": torch.stack(losses), **state}
    start = make_models()["ours"].state_dict()
    eps = torch.finfo(torch.float32 if precision == "no" else torch.bfloat16).eps
    for name, exact in results["exact"].items():
        ours, plain = (results[kind][name].double() for kind in ("ours", "plain"))
        error, plain_error = (ours - exact).norm(), (plain - exact).norm()
        assert error <= 2 * plain_error + 4 * eps * exact.norm(), name
        if name != "losses":
            assert torch.equal(exact.float(), start[name]) == (".lora." not in name), name
