"""Fused modules: tracing a forward, matching the groups in it, running the fused program."""
