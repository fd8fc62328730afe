"""patchhub: a version manager for knowledge edits of language models."""

from __future__ import annotations

__version__ = "0.1.0"
