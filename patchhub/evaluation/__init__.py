"""Measuring models: facts, drift, live decoding."""
