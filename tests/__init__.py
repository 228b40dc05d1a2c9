"""Tests of lora_ext: `python -m pytest`."""
