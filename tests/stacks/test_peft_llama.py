"""20 steps of a small Llama with TRL's LoRA defaults: accelerate() keeps PEFT's run by a seed."""

import functools

import pytest
import torch
from torch import Tensor, nn

from lora_ext import functional
from lora_ext.dropout import pack_bits

peft = pytest.importorskip("peft", reason="needs the package peft")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

from lora_ext.integrations.peft import accelerate  # noqa: E402

STEPS, LAYERS, LINEARS = 20, 2, 7
SIZES = {"hidden_size": 48, "intermediate_size": 84, "vocab_size": 61}
CONFIG = peft.LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    init_lora_weights=False,  # B random: of zeros no mask would show in a loss
)


def make(dtype: torch.dtype, adapters: int) -> nn.Module:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        **SIZES, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), CONFIG)
    for number in range(1, adapters):
        model.add_adapter(f"adapter{number}", CONFIG)
    return model.to(dtype).train()


class Masks:
    """The masks that a model draws, as bits, in their order: ours as drawn, PEFT's as they show."""

    def __init__(self, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Tensor] = []
        own = functional.draw_keep

        def recorded(*given):
            self.drawn.append(own(*given))
            return self.drawn[-1]

        patch.setattr(functional, "draw_keep", recorded)
        for module in model.modules():
            if type(module) is nn.Dropout and module.p:
                module.forward = functools.partial(self.dropped, module.p)

    def dropped(self, p: float, x: Tensor) -> Tensor:
        before = torch.get_rng_state()
        y = nn.functional.dropout(x, p)
        torch.set_rng_state(before)  # of ones each element shows whether it was kept
        shown = nn.functional.dropout(torch.ones_like(x), p)
        self.drawn.append(pack_bits((shown != 0).flatten(0, -2)))
        return y


def run(ours: bool, *, dtype=torch.float32, amp=False, checkpointed=None, accumulate=1, adapters=1):
    """Train for 20 steps of AdamW; return losses, the generator's state a step, and the masks."""
    model = make(dtype, adapters)
    if ours:
        report = accelerate(model)
        assert len(report.accelerated) == LAYERS * LINEARS and not report.left
    if checkpointed is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    tokens = torch.randint(SIZES["vocab_size"], (STEPS * accumulate, 2, 9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.dim()], lr=1e-3)
    losses, states = [], []
    with pytest.MonkeyPatch.context() as patch:
        masks = Masks(model, patch) if not ours else Masks(nn.Module(), patch)
        torch.manual_seed(8)
        for step in range(STEPS):
            if adapters > 1:
                names = ["default", *(f"adapter{i}" for i in range(1, adapters))]
                model.set_adapter(names[step // 3 % adapters])
            for ids in tokens[step * accumulate : (step + 1) * accumulate]:
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    loss = model(input_ids=ids, labels=ids).loss / accumulate
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            states.append(torch.get_rng_state())
    return torch.tensor(losses, dtype=torch.float64), states, masks.drawn


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"checkpointed": False},
        {"checkpointed": True},
        {"accumulate": 2},
        {"amp": True},
        {"adapters": 2},
    ],
    ids=str,
)
def test_20_steps_are_pefts_seed_for_seed(how):
    exact = run(False, dtype=torch.float64, **how | {"amp": False})
    theirs, mine = run(False, **how), run(True, **how)
    passes = 2 if "checkpointed" in how else 1
    assert len(mine[2]) == STEPS * how.get("accumulate", 1) * LAYERS * LINEARS * passes
    for other in (theirs, exact):
        assert len(other[2]) == len(mine[2])
        assert all(map(torch.equal, mine[2], other[2]))  # the masks, bit by bit
        assert all(map(torch.equal, mine[1], other[1]))  # the generator
    off, plain_off = ((r[0] - exact[0]).abs().max() for r in (mine, theirs))
    eps = torch.finfo(torch.bfloat16 if how.get("amp") else torch.float32).eps
    assert off <= 2 * plain_off + eps * exact[0].abs().max(), (off, plain_off)
    assert exact[0][-1] != exact[0][0]
