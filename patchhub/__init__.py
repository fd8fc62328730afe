"""patchhub: a version manager for knowledge edits of language models.

    model = patchhub.load("path/to/repository", revision="main")

What is named below is imported on first use, so that `import patchhub` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["PatchhubError", "__version__", "attach", "detach", "load", "open_repository"]

if TYPE_CHECKING:
    from patchhub.errors import PatchhubError
    from patchhub.runtime.patched_model import detach
    from patchhub.worktree.loading import attach, load
    from patchhub.worktree.loading import open_path as open_repository

_HOMES = {
    "PatchhubError": ("patchhub.errors", "PatchhubError"),
    "attach": ("patchhub.worktree.loading", "attach"),
    "detach": ("patchhub.runtime.patched_model", "detach"),
    "load": ("patchhub.worktree.loading", "load"),
    "open_repository": ("patchhub.worktree.loading", "open_path"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
