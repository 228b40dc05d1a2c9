"""Benchmarks of lora_ext beside what else a user could run; see `bench_linear`."""
