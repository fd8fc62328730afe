"""The solve as sets grow: time, memory and proof at 100 to 100,000 columns, beside the n x n solve where that can run.

    python -m tests.benchmarks.solve [-n 100 -n 1000 ...] [--inner 1536] [--outer 576] [--decades 4]
    python -m tests.benchmarks.solve --model DIR --text FILE [--layer 4]

Keys are drawn with the metric C as their covariance, as real ones lie; C is random with eigenvalues over some decades, or with --model the
second moment of a model's own keys over a text. Columns are drawn block by block, again for each reading, as a store would
read them, and are never held together but for the n x n solve. Seconds are CPU seconds with one thread, drawing not counted; every
number of columns has a process of its own. What is asked for: 100,000 columns in less than 4 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any, TypeVar

import numpy as np

from patchhub import constraints
from patchhub.constraints import Columns, difference, join, moments, no_columns, proof_in_parts
from patchhub.delta import Delta, compact

COUNTS = (100, 1_000, 4_000, 20_000, 100_000)
BOTH_UP_TO = 4_000  # columns that are solved as n x n too
BLOCK = 2048
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

T = TypeVar("T")


@dataclass
class Drawn:
    """Columns that are drawn when they are read; the same every time."""

    count: int
    out: int
    values: np.ndarray
    basis: np.ndarray
    seconds: float = field(default=0.0, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, len(self.values)

    def blocks(self) -> Iterator[Columns]:
        for start in range(0, self.count, BLOCK):
            begun = process_time()
            block = self.block(start, min(BLOCK, self.count - start))
            self.seconds += process_time() - begun
            yield block

    def block(self, seed: int, rows: int) -> Columns:
        generator = np.random.default_rng(seed)
        inner = len(self.values)
        drawn = generator.standard_normal((rows, inner)) * np.sqrt(self.values)
        keys = (drawn @ self.basis.T).astype(np.float32)
        preimages = ((keys @ self.basis / self.values) @ self.basis.T).astype(np.float32)
        residuals = generator.standard_normal((rows, self.out)).astype(np.float32)
        return Columns(keys, preimages, residuals, np.full(rows, inner / 8, np.float32))

    def timed(self, run: Callable[[], T]) -> tuple[T, float]:
        """What a function gives, and its CPU seconds without those of drawing."""
        drawing, begun = self.seconds, process_time()
        result = run()
        return result, process_time() - begun - (self.seconds - drawing)


def measure(drawn: Drawn, sums_beyond: float) -> dict[str, float]:
    """One solve, its proof, and one more column; ``sums_beyond`` as `constraints.SUMS_BEYOND`."""
    constraints.SUMS_BEYOND = sums_beyond
    shape, nothing = drawn.shape, no_columns(drawn.shape)
    one = drawn.block(-1 % 2**32, 1)
    solution: Delta
    if drawn.count > sums_beyond * shape[1]:
        sums, summing = drawn.timed(lambda: moments(drawn.blocks(), shape))
        solution, solving = drawn.timed(sums.solve)
        _, more = drawn.timed(lambda: (sums.add(one), compact(difference(sums, one, nothing))))
    else:
        whole = join(list(drawn.blocks()))
        summing = 0.0
        solution, solving = drawn.timed(lambda: constraints.solve(whole))
        _, more = drawn.timed(lambda: compact(difference(whole, one, nothing)))
    stored, storing = drawn.timed(lambda: compact(solution))
    proven, proving = drawn.timed(lambda: proof_in_parts([solution], shape, drawn.blocks()))
    return {
        "solve": summing + solving + storing,
        "one_more": more,
        "prove": proving,
        "proof": proven,
        "stored_proof": proof_in_parts([stored], shape, drawn.blocks()),
        "peak_mb": peak_of_this_process() / 2**20,
    }


def peak_of_this_process() -> int:
    """Bytes, Linux; what the resource module tells would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def spectrum_of(model: Path, text: Path, layer: int) -> np.ndarray:
    """The second moment of a model's keys at a layer over a text (a JSON list of paragraphs), regularised as a metric is."""
    import torch
    from patchhub.editing.preimages import regularised
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from patchhub.editing.metric import second_moments
    from patchhub.models.architectures import describe
    from patchhub.models.tracing import Stack

    torch.set_num_threads(1)
    factory: Any = AutoModelForCausalLM
    loaded = factory.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    stack = Stack(loaded, describe(loaded.config))
    wanted = 20 * stack.architecture.shapes[layer][1]
    documents: list[list[int]] = []
    for paragraph in json.loads(text.read_text()):
        if sum(map(len, documents)) >= wanted:
            break
        documents.append(tokenizer(paragraph)["input_ids"][:128])
    moment = second_moments(stack, [layer], [document for document in documents if document])[layer]
    return regularised(moment, 0.01).numpy()


def random_spectrum(inner: int, decades: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues that fall over some decades, and a random basis."""
    basis: np.ndarray = np.linalg.qr(np.random.default_rng(0).standard_normal((inner, inner)))[0]
    return np.logspace(0, -decades, inner), basis


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.solve", description=__doc__)
    parser.add_argument("-n", type=int, action="append", help="columns; repeatable")
    parser.add_argument("--inner", type=int, default=1536, help="d_in; a model's own with --model")
    parser.add_argument("--outer", type=int, default=576, help="d_out")
    parser.add_argument("--decades", type=float, default=4.0, help="of the eigenvalues of C")
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--text", type=Path, help="its text: a JSON list of paragraphs")
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("SPECTRUM", "SUMS_BEYOND"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        found = np.load(options.child[0])
        drawn = Drawn(options.n[0], options.outer, found["values"], found["basis"])
        print(json.dumps(measure(drawn, float(options.child[1]))))
        return
    if options.model:
        values, basis = np.linalg.eigh(spectrum_of(options.model, options.text, options.layer))
    else:
        values, basis = random_spectrum(options.inner, options.decades)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spectrum.npz"
        np.savez(path, values=values, basis=basis)
        rows = [_row(path, count, options.outer, len(values)) for count in options.n or COUNTS]
    print(f"d_in {len(values)}, d_out {options.outer}, C's eigenvalues {values.min():.2g} to {values.max():.2g}")
    print(json.dumps(rows, indent=2) if options.json else _table(rows))


def _row(path: Path, count: int, out: int, inner: int) -> dict[str, Any]:
    row: dict[str, Any] = {"n": count, "inner": inner, "chosen": _child(path, count, out, constraints.SUMS_BEYOND)}
    other = math.inf if count > constraints.SUMS_BEYOND * inner else 0.0
    if count <= BOTH_UP_TO:
        row["other"] = _child(path, count, out, other)
    return row


def _child(path: Path, count: int, out: int, sums_beyond: float) -> dict[str, float]:
    words = ["-n", str(count), "--outer", str(out), "--child", str(path), str(sums_beyond)]
    command = [sys.executable, "-m", "tests.benchmarks.solve", *words]
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "      n   space   solve s   n x n is   one more s   prove s   peak MB    proof   stored",
    ]
    for row in rows:
        chosen, other = row["chosen"], row.get("other")
        by_sums = row["n"] > constraints.SUMS_BEYOND * row["inner"]
        times = ""
        if other is not None:
            by_requests, by_inputs = (other, chosen) if by_sums else (chosen, other)
            times = f"{by_requests['solve'] / by_inputs['solve']:.2f} x"
        lines.append(
            f"{row['n']:7,}   {'in' if by_sums else 'n':>5}   {chosen['solve']:7.3f}   {times:>8}   {chosen['one_more']:10.3f}   "
            f"{chosen['prove']:7.3f}   {chosen['peak_mb']:7.0f}   {chosen['proof']:.0e}   {chosen['stored_proof']:.0e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
