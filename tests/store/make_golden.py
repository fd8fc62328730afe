"""Write the golden store of the present format; run only when a new format is made, never to repair an old one.

python tests/store/make_golden.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from builders import make_history

from patchhub.canonical import FORMAT

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    target = GOLDEN / f"format-{FORMAT}"
    if target.exists():
        raise SystemExit(f"{target} exists; a golden store never changes")
    with tempfile.TemporaryDirectory() as name:
        make_history(Path(name)).close()
        shutil.copytree(Path(name) / ".patchhub", target, ignore=shutil.ignore_patterns("lock", "cache"))


if __name__ == "__main__":
    main()
