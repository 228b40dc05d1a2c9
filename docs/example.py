# %% [markdown]
# # An example, cell by cell
#
# A model that is given, a task that is new: we fine-tune with the plain LoRA layer and with ours,
# side by side, and plot loss and speed. It takes half a minute and needs torch and matplotlib.

# %%
import copy
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import lora_ext
from lora_ext import testing

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Two models, one start
#
# The model has four linears. The task is to behave like a copy of it whose weights differ by a
# matrix of rank 4, which is what an adapter of rank 8 can learn. `testing` has the plain classes,
# the ones that people write by hand. Under one seed both draw the same A.


# %%
def block() -> nn.Module:
    return nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384), nn.LayerNorm(384))


base = nn.Sequential(block(), block()).requires_grad_(False)
teacher = copy.deepcopy(base)
for linear in (m for m in teacher.modules() if isinstance(m, nn.Linear)):
    out, in_ = linear.weight.shape
    linear.weight += 0.3 * torch.randn(out, 4) @ torch.randn(4, in_) / (4 * in_) ** 0.5

plain, ours = copy.deepcopy(base), copy.deepcopy(base)
torch.manual_seed(1)
testing.replace_linear_with_lora(plain, 8, 2.0)
torch.manual_seed(1)
print(lora_ext.replace_linear_with_lora(ours, 8, 2.0))
lora_ext.mark_only_lora_as_trainable(ours)
print(lora_ext.explain(ours[0][0], torch.randn(256, 384)))

# %% [markdown]
# ## Train both in lockstep
#
# Every step gives both the same batch, so their losses can be compared. They take turns at being
# first, so that a slow second of the machine meets both.

# %%
models = {"plain": plain, "lora_ext": ours}
optimizers = {
    name: torch.optim.AdamW([p for n, p in m.named_parameters() if ".lora." in n], lr=3e-3)
    for name, m in models.items()
}
losses = {name: [] for name in models}
ms = {name: [] for name in models}
for step in range(120):
    x = torch.randn(256, 384)
    target = teacher(x)
    for name in models if step % 2 else reversed(models):
        model = models[name]
        begin = time.perf_counter()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        ms[name].append(1e3 * (time.perf_counter() - begin))
        losses[name].append(loss.item())

gap = max(abs(a - b) for a, b in zip(losses["plain"], losses["lora_ext"], strict=True))
print(f"loss {losses['lora_ext'][0]:.3f} -> {losses['lora_ext'][-1]:.3f}")
print(f"largest difference of the two losses: {gap:.1e}")
assert gap < 1e-5 and losses["lora_ext"][-1] < 0.8 * losses["lora_ext"][0]

# %% [markdown]
# ## Loss and time of each step
#
# The broad line is the plain layer's, the thin one on it is ours.

# %%
COLORS = {"plain": "#d1702c", "lora_ext": "#1f5fa8"}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, width in (("plain", 5), ("lora_ext", 1.5)):
    left.plot(losses[name], color=COLORS[name], linewidth=width, alpha=0.8, label=name)
    label = f"{name}, median {statistics.median(ms[name]):.1f} ms"
    right.plot(ms[name], ".", color=COLORS[name], label=label)
left.set(xlabel="step", ylabel="loss", yscale="log")
right.set(xlabel="step", ylabel="ms", ylim=(0, 3 * statistics.median(ms["plain"])))
for axes in (left, right):
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Speed by number of rows
#
# One layer, forward and backward, of 1 to 1,024 rows. The band goes from the lower to the upper
# quartile of 20 pairs.

# %%
layers = {
    "plain": testing.LinearWithLoRA(nn.Linear(768, 768).requires_grad_(False), 16, 1.0),
    "lora_ext": lora_ext.LinearWithLoRA(nn.Linear(768, 768).requires_grad_(False), 16, 1.0),
}


def step_ms(layer: nn.Module, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.lora.parameters()], y)
    return 1e3 * (time.perf_counter() - begin)


rows = [1, 4, 16, 64, 256, 1024]
quartiles = []
for M in rows:
    x = torch.randn(M, 768, requires_grad=True)
    pairs = [[step_ms(layer, x) for layer in layers.values()] for _ in range(23)][3:]
    quartiles.append(statistics.quantiles([a / b for a, b in pairs], n=4))

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
low, middle, high = zip(*quartiles, strict=True)
axes.plot(rows, middle, "s-", color=COLORS["lora_ext"])
axes.fill_between(rows, low, high, color=COLORS["lora_ext"], alpha=0.2, linewidth=0)
axes.axhline(1, color="black", linewidth=0.8)
axes.set(xscale="log", xlabel="rows of x", ylabel="plain / lora_ext", ylim=(0, None))
axes.set_xticks(rows, map(str, rows))
axes.minorticks_off()
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Save, load, merge
#
# The adapter is a small file. Merged into the weights, the model is a plain one again.

# %%
lora_ext.save_adapter(ours, "adapter.safetensors")
fresh = copy.deepcopy(base)
print(lora_ext.load_adapter(fresh, "adapter.safetensors"))
x = torch.randn(4, 384)
print("as trained:", torch.equal(fresh(x), ours(x)))
print(lora_ext.merge_(fresh, unload=True), type(fresh[0][0]).__name__)
print(f"merged, y differs by at most {(fresh(x) - ours(x)).abs().max():.1e}")
