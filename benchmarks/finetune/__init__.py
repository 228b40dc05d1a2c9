"""Fine-tune a real model with the plain LoRA layer and with ours, side by side.

`python -m benchmarks.finetune` runs it; `--help` lists what can be chosen.
"""
