"""patchhub: a version manager for knowledge edits of language models.

    repo = patchhub.Repository.init("facts", "HuggingFaceTB/SmolLM2-135M-Instruct")
    repo.commit([{"prompt": "The capital of {} is", "subject": "Kazakhstan", "target_new": "Astana"}], message="A correction")
    model = repo.load()

What is named below is imported on first use, so that `import patchhub` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "PatchhubError",
    "Repository",
    "Request",
    "__version__",
    "attach",
    "clone",
    "detach",
    "errors",
    "load",
    "open",
]

if TYPE_CHECKING:
    from patchhub import errors
    from patchhub.errors import PatchhubError
    from patchhub.objects import Request
    from patchhub.repository import Repository, clone, open
    from patchhub.runtime.patched_model import detach
    from patchhub.worktree.loading import attach, load

_HOMES = {
    "PatchhubError": "patchhub.errors",
    "Repository": "patchhub.repository",
    "Request": "patchhub.objects",
    "attach": "patchhub.worktree.loading",
    "clone": "patchhub.repository",
    "detach": "patchhub.runtime.patched_model",
    "errors": "patchhub",
    "load": "patchhub.worktree.loading",
    "open": "patchhub.repository",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "errors":
        return import_module("patchhub.errors")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
