"""One more fact on a store of many: what solving it, proving it and reading for both costs as the store grows.

    python -m tests.benchmarks.kept_sums [-n 100 -n 1000 ...] [--inner 1536] [--outer 576] [--steps 24]

The store has one weight and columns drawn at random, C diagonal with eigenvalues over four decades. Facts are committed one by one on
top; seconds are CPU seconds of `prepare` (the set, the solve, the change, the proof) and of the solve with all that is read for it alone.
Bytes are those of columns and of kept sums that were read.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import process_time

import numpy as np

from patchhub.constraints import Columns
from patchhub.objects import Base, Element, Patch, Request, TensorRecord, requests_json
from patchhub.sets import sums
from patchhub.sets.columns import write_columns
from patchhub.sets.commits import Draft, prepare, record
from patchhub.store.store import Store
from patchhub.who import Who
from tests.benchmarks.synthetic_store import AUTHOR, HastyDisk

WEIGHT = "h.0.out.weight"
BATCH = 2000
WHO = Who(AUTHOR, "2026-11-21T09:30:00Z", "facts")


class Grown:
    """A store of so many facts, in one commit."""

    def __init__(self, folder: Path, count: int, out: int, inner: int) -> None:
        self.shape = (out, inner)
        self.spectrum = np.logspace(0, -4, inner)
        self.generator = np.random.default_rng(0)
        base = Base({"model_type": "example"}, {WEIGHT: TensorRecord("F32", self.shape, "0" * 64)})
        weights = {WEIGHT: {"norm": 1.0, "shape": list(self.shape)}}
        info = {
            "model_type": "example",
            "orientation": "out_in",
            "path": str(folder),
            "revision": None,
            "weights": weights,
        }
        self.store = Store.init(
            folder, base.to_json(), base_info=info, settings={}, author=AUTHOR, time=WHO.time, disk=HastyDisk()
        )
        self.made = 0
        elements: frozenset[Element] = frozenset()
        while self.made < count:
            elements |= self.patch(min(BATCH, count - self.made)).elements
        self.commit(elements)

    def patch(self, count: int) -> Patch:
        numbers = range(self.made, self.made + count)
        self.made += count
        requests = [Request.make("The mother tongue of {} is", f"Person {n}", "French") for n in numbers]
        out, inner = self.shape
        keys = (self.generator.standard_normal((count, inner)) * np.sqrt(self.spectrum)).astype(np.float32)
        columns = Columns(
            keys,
            (keys / self.spectrum).astype(np.float32),
            self.generator.standard_normal((count, out)).astype(np.float32),
            np.full(count, inner / 8, np.float32),
        )
        put = self.store.objects.put
        patch = Patch(
            base=self.store.config.base_id,
            kind="closed_form",
            made_on=None,
            method="memit",
            metric=None,
            requests=tuple(request.id for request in requests),
            requests_blob=put(requests_json(requests)),
            settings={},
            tensors=put(write_columns({WEIGHT: columns}, np.zeros((count, 1)))),
            weights={WEIGHT: self.shape},
        )
        put(patch.to_json())
        return patch

    def commit(self, elements: frozenset[Element]) -> tuple[float, float]:
        """CPU seconds of preparing a commit of this set, and the proof that it keeps."""
        head = self.store.head[1]
        draft = Draft((head,) if head else (), elements, None, "commit", {})
        begun = process_time()
        prepared = prepare(self.store, draft, WHO)
        took = process_time() - begun
        record(self.store, prepared, draft)
        return took, prepared.check["proof"][WEIGHT]

    def one_more(self) -> dict[str, float]:
        """What a commit of one more fact costs."""
        before = self.store.active(self.store.head[1])
        after = before | self.patch(1).elements
        read: list[int] = []
        original, loading = sums.read_patches, sums.load_file
        sums.read_patches = lambda *given: (read.append(_bytes(part)) or part for part in original(*given))  # type: ignore
        sums.load_file = lambda path: read.append(Path(path).stat().st_size) or loading(path)  # type: ignore
        begun = process_time()
        sums.solve_change(self.store, before, after, near=self.store.head[1])
        solving = process_time() - begun
        once = sum(read)
        took, proof = self.commit(after)
        sums.read_patches, sums.load_file = original, loading
        return {"solve": solving, "prepare": took, "read_mb": once / 1e6, "proof": proof}


def _bytes(part: dict[str, Columns]) -> int:
    return sum(array.nbytes for c in part.values() for array in (c.keys, c.preimages, c.residuals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", action="append", type=int)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--outer", type=int, default=576)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    print(f"{'facts':>8} {'first':>8} {'solve':>8} (most) {'prepare':>8} (most) {'read MB':>8} (most)    proof   CPU s")
    for count in options.n or (100, 1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as name:
            grown = Grown(Path(name), count, options.outer, options.inner)
            first = grown.one_more()
            rows = [grown.one_more() for _ in range(options.steps)]
            grown.store.close()
        shown = [
            (float(np.median([r[k] for r in rows])), max(r[k] for r in rows)) for k in ("solve", "prepare", "read_mb")
        ]
        middle = " ".join(f"{median:8.3f} {most:6.2f}" for median, most in shown)
        print(f"{count:8,} {first['prepare']:8.2f} {middle} {rows[-1]['proof']:9.1e}", flush=True)


if __name__ == "__main__":
    main()
