"""Benchmarks: pytest-benchmark over the ops, and measured results by device."""
