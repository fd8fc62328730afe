"""Write what is pinned anew: `python -m tests.pins.regenerate`. Only where a change is meant; read the difference."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.pins.history import EPOCH, found_in, make_history
from tests.pins.verbs import file_of, run_all

HERE = Path(__file__).parent


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": EPOCH}
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as os.environ["PATCHHUB_CACHE"]:
        make_history(Path(name))
        write(HERE / "history.json", found_in(Path(name)))
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as os.environ["PATCHHUB_CACHE"]:
        for verb, documents in run_all(Path(name)).items():
            write(file_of(verb), documents)


def write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
