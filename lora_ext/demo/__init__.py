"""Fine-tune a real model with the plain LoRA layer and with ours, side by side.

`python -m lora_ext.demo` runs it; `--help` lists what can be chosen.
"""
