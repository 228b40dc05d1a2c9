"""Benchmarks of the GPU kernels alone: what a card reaches, and what the cost model predicts."""
