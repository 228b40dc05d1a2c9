"""The plain LoRA layer as people write it by hand: what the demo compares with.

Given by the user of this project; the code is theirs, unchanged.
"""

import math

import torch


class LoRALayer(torch.nn.Module):
    """Low-rank part: `alpha * (x @ A @ B)`, A (in_dim, rank), B (rank, out_dim)."""

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = torch.nn.Parameter(torch.empty(in_dim, rank))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = torch.nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha

    def forward(self, x):
        """Return `alpha * (x @ A @ B)`, (..., out_dim)."""
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(torch.nn.Module):
    """Linear layer with a low-rank update: `linear(x) + lora(x)`."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x):
        """Return `linear(x) + lora(x)`, (..., out_features)."""
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model, rank, alpha):
    """Replace every linear in a model by a LinearWithLoRA around it, in place."""
    for name, module in model.named_children():
        if isinstance(module, torch.nn.Linear):
            setattr(model, name, LinearWithLoRA(module, rank, alpha))
        else:
            replace_linear_with_lora(module, rank, alpha)
