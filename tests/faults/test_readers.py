"""Whatever bytes a reader is given, it reads them as what they are or refuses them in an error of patchhub's own.

Starts from the golden objects and a kept corpus, and changes bytes, or values of the JSON in them. What is found goes to `corpus/`, so that
it is tried ever after. For 600 seconds:

    PATCHHUB_FUZZ=600 python -m pytest -m slow tests/faults/test_readers.py
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchhub.canonical import canonical_json
from patchhub.delta import read_delta, read_deltas, weights_in, write_deltas
from patchhub.editing.requests import read_requests
from patchhub.errors import PatchhubError
from patchhub.export.foreign import read_adapter
from patchhub.fsio import Span
from patchhub.models.checkpoint import read_header
from patchhub.objects import Note, Operation, Patch, requests_json, set_json
from patchhub.remotes.remote import read_branch, read_folder
from patchhub.sets.columns import tensor_check
from patchhub.sets.merging import read_choices
from patchhub.signing.ssh import is_own, principal_of
from patchhub.signing.statements import read_signature
from patchhub.store.config import read_config
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
        if isinstance(value, Note):
            with contextlib.suppress(ValueError):  # says why it keeps none
                read_signature("0" * 64, value)
    with contextlib.suppress(PatchhubError):
        assert Operation.from_json(data).to_json() == data


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
                tensor_check(SHAPES, SHAPES)(owner, Span.of(file))
            except PatchhubError:
                continue
        try:
            found = read_deltas(data, SHAPES)
        except PatchhubError:
            for act in (lambda: weights_in(Span.of(file)), lambda: read_delta(Span.of(file), "w", SHAPES["w"])):
                try:
                    act()
                except PatchhubError:
                    continue
            return
        assert weights_in(Span.of(file)) == found.keys()
        again = read_deltas(write_deltas(found), SHAPES)
        assert write_deltas(again) == write_deltas(found)


def read_records(data: bytes) -> None:
    try:
        read_requests(io.BytesIO(data))
    except PatchhubError:
        return


def read_files(data: bytes) -> None:
    """Files that users name and that others may have made: a base's tensors, a config, choices, keys, an adapter's two files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, settings, tensors = (
            folder / part for part in ("file", "adapter_config.json", "adapter_model.safetensors")
        )
        for path in (file, settings, tensors):
            path.write_bytes(data)
        acts: list[Callable[[], object]] = [
            lambda: read_header(file),
            lambda: read_config(file),
            lambda: read_choices(file),
            lambda: is_own(file),
            lambda: principal_of(file, "ssh-ed25519 AAAA", "commit", "2026-11-21T09:30:00Z"),
            lambda: read_adapter(folder, SHAPES),
        ]
        for act in acts:
            with contextlib.suppress(PatchhubError):
                act()
        settings.write_text(ADAPTER, encoding="utf-8")
        with contextlib.suppress(PatchhubError):
            read_adapter(folder, SHAPES)


ADAPTER = '{"peft_type": "LORA", "lora_alpha": 2, "r": 1, "target_modules": ["h.0.out"], "bias": "none"}'
READERS: list[Callable[[bytes], None]] = [read_object, read_manifest, read_tensors, read_records, read_files]

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        2**63,
        10**30,
        1e308,
        "",
        "\x1b[2J",
        "\u202e",
        "0" * 64,
        "..",
        "a" * 300,
        "é",
        "e\u0301",
    ),
    *([], {}, [[]], {"a": {}}, [None], {"": 0}, "2026-02-30T00:00:00Z", "refs/heads/x", "__metadata__", "F32", "BF16"),
]
"""Values that somebody may have forgotten."""


def odd_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place in it replaced, taken away, doubled or added to."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {other: item for other, item in value.items() if other != name}
        if kind == 1:
            return {**value, str(rng.choice(ODD)): rng.choice(ODD)}
        return {**value, name: odd_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        kind = rng.randrange(8)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return [*value, value[place]]
        return [*value[:place], odd_json(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def with_odd_json(data: bytes, rng: random.Random) -> bytes | None:
    """The same document, or tensors under the same header, with an odd value somewhere; None where there is no JSON."""
    length = int.from_bytes(data[:8], "little")
    header = 8 < length <= len(data) - 8
    try:
        value = json.loads(data[8 : 8 + length] if header else data)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            value = odd_json(value, rng)
        made = canonical_json(value)
    except (ValueError, RecursionError):
        return None
    if not header:
        return made
    made += b" " * (-len(made) % 8)
    return len(made).to_bytes(8, "little") + made + data[8 + length :]


def changed(data: bytes, rng: random.Random) -> bytes:
    """An odd value in its JSON, or some bytes flipped, cut, doubled or taken from another seed."""
    if rng.random() < 0.5 and (odd := with_odd_json(data, rng)) is not None:
        return odd
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


@pytest.mark.slow
@pytest.mark.long
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
                (HERE / "corpus" / f"found_{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
                raise AssertionError(f"{read.__name__} with {data!r}, number {number}") from error
        number += 1
    print(number - start, "inputs")
