"""`python -m patchhub`."""

from __future__ import annotations

from patchhub.cli.main import main

main(prog_name="patchhub")
