"""Patched models in memory: composing weights, loading, attaching and detaching patches."""
