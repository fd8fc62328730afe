"""Whatever bytes a reader is given, it reads them as what they are or refuses them in an error of patchhub's own.

Starts from the golden objects and a kept corpus, and changes bytes. `PATCHHUB_FUZZ=600 pytest tests/faults/test_readers.py` goes on for
600 seconds; what it finds goes to `corpus/`, so that it is tried ever after.
"""

from __future__ import annotations

import io
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchhub.delta import read_delta, read_deltas, weights_in, write_deltas
from patchhub.editing.requests import read_requests
from patchhub.errors import PatchhubError
from patchhub.objects import Patch, requests_json, set_json
from patchhub.remotes.remote import read_branch, read_folder
from patchhub.sets.columns import tensor_check
from patchhub.store.states import KINDS, unfit

HERE = Path(__file__).parent
SHAPES = {"w": (2, 3), "h.0.out.weight": (6, 48)}
WRITERS = {"requests": requests_json, "set": set_json}
SEEDS = sorted(
    {
        path.read_bytes()
        for folder in (HERE / "corpus", HERE.parent / "store" / "golden")
        for path in folder.rglob("*")
        if path.is_file()
    }
)
PATCH = Patch("0" * 64, "closed_form", None, "memit", None, ("1" * 64,), "2" * 64, {}, "3" * 64, SHAPES)


def read_object(data: bytes) -> None:
    """What is read is written as the same bytes, and its names can be judged."""
    for kind, how in KINDS.items():
        try:
            value = how.read(data)
        except PatchhubError:
            continue
        assert WRITERS.get(kind, lambda value: value.to_json())(value) == data
        list(how.references(value))
        list(unfit(value))


def read_manifest(data: bytes) -> None:
    for read in (read_folder, read_branch):
        try:
            assert read(data, "here").to_json() == data
        except PatchhubError:
            continue


def read_tensors(data: bytes) -> None:
    """The header alone and the whole file agree, and what is read is written and read the same again."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors"
        file.write_bytes(data)
        for owner in (None, PATCH):
            try:
                tensor_check(SHAPES, SHAPES)(owner, file)
            except PatchhubError:
                continue
        try:
            found = read_deltas(data, SHAPES)
        except PatchhubError:
            for act in (lambda: weights_in(file), lambda: read_delta(file, "w", SHAPES["w"])):
                try:
                    act()
                except PatchhubError:
                    continue
            return
        assert weights_in(file) == found.keys()
        again = read_deltas(write_deltas(found), SHAPES)
        assert write_deltas(again) == write_deltas(found)


def read_records(data: bytes) -> None:
    try:
        read_requests(io.BytesIO(data))
    except PatchhubError:
        return


READERS: list[Callable[[bytes], None]] = [read_object, read_manifest, read_tensors, read_records]


def changed(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled or taken from another seed."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(made) + 1)
        end = min(len(made), start + rng.choice([1, 1, 2, 8, 64]))
        kind = rng.randrange(5)
        if kind == 0 and made:
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[start:end]
        elif kind == 2:
            made[start:start] = made[start:end] * rng.choice([1, 2, 100])
        elif kind == 3:
            other = rng.choice(SEEDS)
            cut = rng.randrange(len(other) + 1)
            made[start:end] = other[cut : cut + rng.choice([1, 8, 64])]
        else:
            made[start:end] = rng.choice([b"null", b"-1", b'"', b"{", b"[]", b"1e400", b"\xff", b"\\u0000", b"9" * 30])
    return bytes(made)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_the_corpus_is_read_or_refused(read: Callable[[bytes], None]) -> None:
    for seed in SEEDS:
        read(seed)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.sampled_from(SEEDS), number=st.integers(0, 2**32))
def test_changed_bytes_are_read_or_refused(read: Callable[[bytes], None], seed: bytes, number: int) -> None:
    read(changed(seed, random.Random(number)))


@pytest.mark.skipif("PATCHHUB_FUZZ" not in os.environ, reason="PATCHHUB_FUZZ says for how many seconds")
def test_changed_bytes_are_read_or_refused_for_long() -> None:
    until = time.monotonic() + float(os.environ["PATCHHUB_FUZZ"])
    start = number = random.SystemRandom().randrange(2**32)
    while time.monotonic() < until:
        rng = random.Random(number)
        data = changed(rng.choice(SEEDS), rng)
        for read in READERS:
            try:
                read(data)
            except Exception as error:
                raise AssertionError(f"{read.__name__} with {data!r}, number {number}") from error
        number += 1
    print(number - start, "inputs")
