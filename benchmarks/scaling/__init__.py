"""Simulated steps of a large decoder over many ranks, without the ranks."""
