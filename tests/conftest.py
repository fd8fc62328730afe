"""What all tests share: one torch thread (tiny models are slower with more), no network, and a folder in place of the user's cache."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # what one worker keeps of a base the others find
    os.environ["PATCHHUB_CACHE"] = tempfile.mkdtemp(prefix="patchhub-tests-")
    atexit.register(shutil.rmtree, os.environ["PATCHHUB_CACHE"], ignore_errors=True)

gc.set_threshold(10_000, *gc.get_threshold()[1:])  # as the command does: a twelfth of the tests' CPU time
atexit.register(gc.freeze)


@pytest.fixture(scope="module")
def short_texts() -> Iterator[None]:
    """Texts whose fluency is measured have 32 tokens, not 100: they are written token by token, and no test here depends on how long."""
    from patchhub.porcelain import measure  # says its own number, whichever test imports it first
    from patchhub.worktree import measuring

    assert measure.FLUENCY_TOKENS >= measuring.FLUENCY_TOKENS
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measuring, "FLUENCY_TOKENS", 32)
        yield
