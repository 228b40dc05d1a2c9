"""Fine-tune a real model with the plain LoRA layer and with ours, side by side."""
