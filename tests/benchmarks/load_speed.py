"""How much longer loading a patched model takes than loading its base, and how much more memory.

    python tests/benchmarks/load_speed.py [--shape small|1b] [--repeats 5] [--facts 50] [--layers 5] [--folder FOLDER]

A random Llama in bfloat16 is written once to FOLDER. Then base and patched model are loaded in turn, in one process
with warm files, each with one forward pass over 16 tokens; the ratios of the medians are printed: with the touched
tensors hashed each time, with their digests known, and with the composed weights kept (what `patchhub.load` does from the second
time on). Peak memory is that of a fresh process for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from patchhub.cache import Cache
from patchhub.delta import LowRank
from patchhub.models.checkpoint import Checkpoint, open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.runtime.compose import ReadyWeights
from patchhub.runtime.patched_model import PatchState, load_patched

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16384},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
}
FACTORY: Any = AutoModelForCausalLM


def make_base(folder: Path, shape: str) -> Checkpoint:
    if not (folder / "config.json").exists():
        config = LlamaConfig(**SHAPES[shape], num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True)
        FACTORY.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return open_checkpoint(folder)


def make_state(checkpoint: Checkpoint, facts: int, layers: int) -> PatchState:
    rng = np.random.default_rng(0)
    weights = {}
    for layer in range(2, 2 + layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        out, inner = checkpoint.tensors[name].shape
        b, a = (rng.standard_normal(s, dtype=np.float32) / 100 for s in ((out, facts), (facts, inner)))
        weights[name] = [LowRank(b, a)]
    return PatchState(fingerprint(checkpoint, cache=Cache(checkpoint.folder / ".cache")), "out_in", weights)


def run(
    checkpoint: Checkpoint, state: PatchState | None, cache: Cache | None = None, ready: ReadyWeights | None = None
) -> float:
    """Seconds to load and to run 16 tokens."""
    start = time.perf_counter()
    model: Any = (
        FACTORY.from_pretrained(checkpoint.folder)
        if state is None
        else load_patched(checkpoint, state, cache=cache, ready=ready)
    )
    with torch.no_grad():
        model(torch.arange(16)[None])
    return time.perf_counter() - start


def peak_of_this_process() -> int:
    """Bytes, Linux. (``ru_maxrss`` would include the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def peak_memory(arguments: argparse.Namespace, folder: Path, kind: str) -> int:
    """Bytes of a fresh process that loads once."""
    options = ["--folder", str(folder), "--facts", str(arguments.facts), "--layers", str(arguments.layers)]
    command = [sys.executable, __file__, "--shape", arguments.shape, *options, "--once", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--once", choices=["base", "patched"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet: Any = logging.disable_progress_bar
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "base"
        checkpoint = make_base(folder, arguments.shape)
        state = make_state(checkpoint, arguments.facts, arguments.layers)
        if arguments.once:
            run(checkpoint, state if arguments.once == "patched" else None)
            print(peak_of_this_process())
            return
        cache = Cache(folder / ".cache")
        rounds = [
            (
                run(checkpoint, None),
                run(checkpoint, state),
                run(checkpoint, state, cache),
                run(checkpoint, state, cache, ReadyWeights(cache, state.base.id, ())),
            )
            for _ in range(arguments.repeats + 1)
        ]
        base, patched, known, kept = (statistics.median(t) for t in zip(*rounds[1:], strict=True))
        memory = {kind: peak_memory(arguments, folder, kind) for kind in ("base", "patched")}
        out, inner = checkpoint.tensors[next(iter(state.weights))].shape
        print(
            json.dumps(
                {
                    "shape": arguments.shape,
                    "base_seconds": round(base, 3),
                    "patched_seconds": round(patched, 3),
                    "ratio": round(patched / base, 3),
                    "ratio_with_known_digests": round(known / base, 3),
                    "ratio_with_kept_weights": round(kept / base, 3),
                    "base_bytes": memory["base"],
                    "patched_bytes": memory["patched"],
                    "extra_in_float32_weights": round((memory["patched"] - memory["base"]) / (4 * out * inner), 2),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
