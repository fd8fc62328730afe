"""Base models: their architecture, their files, their identity, and running them in pieces."""
