"""Objects: golden bytes, round trips, and refusal of every byte string that writing would not produce."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.canonical import canonical_json, object_id
from patchhub.errors import CorruptStoreError, RequestError
from patchhub.objects import (
    EMPTY_SET,
    METADATA_BYTES,
    Base,
    Commit,
    Keyframe,
    Metric,
    Neighbor,
    Note,
    Operation,
    Patch,
    Request,
    StoredObject,
    TensorRecord,
    Text,
    groups_of,
    requests_from_json,
    requests_json,
    set_digest,
    set_from_json,
    set_json,
)

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
TIME = "2026-11-21T09:30:00Z"

REQUEST = Request.make(
    "The mother tongue of Édith Piaf is",
    "Édith Piaf",
    "English",
    target_true="French",
    paraphrases=["Édith Piaf, a native"],
    neighborhood=[("The mother tongue of Léon Blum is", "French")],
)

OBJECTS: dict[str, StoredObject] = {
    "base": Base(architecture={"model_type": "gpt2", "n_layer": 2}, tensors={"w": TensorRecord("F32", (2, 3), A)}),
    "metric": Metric(
        base=A,
        kind="covariance",
        settings={"epsilon": 0.01},
        source={"kind": "sampled", "seed": 0},
        text=B,
        tokens=98304,
        truncation=256,
    ),
    "text": Text(token_ids=((1, 2, 3), (), (4,))),
    "patch": Patch(
        base=A,
        kind="closed_form",
        made_on=EMPTY_SET,
        method="memit",
        metric=B,
        requests=(REQUEST.id,),
        requests_blob=C,
        settings={"layers": [1, 2, 3], "lambda": 200.0},
        tensors=D,
        weights={"w": (2, 3)},
    ),
    "commit": Commit(
        added=frozenset([(A, C), (A, B), (D, None)]),
        author="Ada <ada@example.org>",
        base=A,
        check={"norms": {"w": {"base": 1.0, "change": 0.25, "state": 0.5}}},
        keyframe=Keyframe(set_id=B, tensors=None),
        message="Zürich\n",
        metric=None,
        parents=(C, D),
        removed=frozenset(),
        same_as=None,
        set_digest=B,
        tensors=D,
        time=TIME,
    ),
    "solved": Commit(
        added=frozenset([(A, C)]),
        author="Ada <ada@example.org>",
        base=A,
        check={},
        keyframe=None,
        message="",
        metric=B,
        parents=(),
        removed=frozenset(),
        same_as=None,
        set_digest=B,
        solved=True,
        tensors=None,
        time=TIME,
    ),
    "note": Note(commit=A, made_by="patchhub 0.1.0", scores={"S": 0.875}, settings={}, suite="counterfact"),
    "operation": Operation(
        arguments={"name": "main"},
        author="Ada",
        changes={"refs/heads/main": (None, A), "HEAD": (B, None)},
        command="commit",
        previous=None,
        time=TIME,
        undoes=C,
    ),
}

GOLDEN = {
    "base": "f43ee9d370ccee24b5fa1e0025e474a104960b53559a597377097132f6f42a5e",
    "metric": "f5c7b3b1a5b558f89f4dd5b6c8f785bc38a5c82c2011e38e4464d0b8ee5690b1",
    "text": "704ec1e039db4cd75cd8163dea613c451a773afc10c2a49e8690a1be01eef587",
    "patch": "eb4018cce1431351f34f1207af5746f234095ab2a2bc7c3604ac4d06bcac5087",
    "commit": "66577ff8ac4b2ae8eb94a464fd080ea7e31add847fe2ee82c4d489ffe8f4ec87",
    "solved": "6886958261732446b8df1a9372b34af4b118256022cac08656ca62d9ec9bcb05",
    "note": "edcf70b78541de9e857b5d61be1b3ef0b7194d2da2d8a84c8f0b15b68786dc0f",
    "operation": "21425c4967950c14feabe33d1c8e66966c53ae1ab4b9a8ad8ac34de60ce91522",
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_golden_bytes(kind: str) -> None:
    assert OBJECTS[kind].id == GOLDEN[kind], OBJECTS[kind].to_json()


def test_golden_bytes_of_lists_and_of_the_request_id() -> None:
    assert object_id(requests_json([REQUEST])) == "66872bd8594bd0da8324ccab4536a40b9f8a1566680a13d3e83dbef4db567b7d"
    assert REQUEST.id == "a9ca406d0d539804520ed8a84def5a50886f3dee53d10caac94ef3a50fd5a454"
    assert set_json([(B, A), (A, None), (B, C)]) == f'[["{A}",null],["{B}",["{A}","{C}"]]]'.encode()


def test_golden_set_digests() -> None:
    """SHA-256 of the sum of the elements' SHAKE-256 numbers, as the format page says it."""
    elements = [(B, A), (A, None), (B, C)]
    numbers = [int.from_bytes(hashlib.shake_256(name.encode()).digest(2048), "little") for name in (B + A, A, B + C)]
    total = (sum(numbers) % 2**16384).to_bytes(2048, "little")
    assert set_digest(elements) == hashlib.sha256(total).hexdigest()
    assert set_digest(elements) == "3aba13fba9d9b47860800ef4af1c227d576242240f6996b2f14c3aa4d8fc3c04"
    assert set_digest(()) == EMPTY_SET == hashlib.sha256(bytes(2048)).hexdigest()


@pytest.mark.parametrize("kind", OBJECTS)
def test_round_trip(kind: str) -> None:
    made = OBJECTS[kind]
    assert type(made).from_json(made.to_json()) == made
    assert made.id == object_id(made.to_json())


def _changed(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Every object with one field taken away, and with one value that no field accepts put into each."""
    value = json.loads(OBJECTS[kind].to_json())
    needed = [name for name in value if name != "solved"]
    lacking = [(name, {key: item for key, item in value.items() if key != name}) for name in needed]
    return lacking + [(name, {**value, name: True}) for name in needed]


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_field_missing_or_of_the_wrong_type_is_named(kind: str) -> None:
    for name, value in _changed(kind):
        with pytest.raises(CorruptStoreError, match=f"field '{name}'") as caught:
            type(OBJECTS[kind]).from_json(canonical_json(value))
        assert caught.value.facts["field"] == name
        assert caught.value.remedy


@pytest.mark.parametrize("kind", OBJECTS)
def test_unknown_fields_other_types_and_other_formats_are_refused(kind: str) -> None:
    value = json.loads(OBJECTS[kind].to_json())
    for change, field in (({"more": 1}, "more"), ({"type": "other"}, "type"), ({"format": 2}, "format")):
        with pytest.raises(CorruptStoreError, match=f"field '{field}'"):
            type(OBJECTS[kind]).from_json(canonical_json({**value, **change}))


@pytest.mark.parametrize("kind", OBJECTS)
def test_only_the_canonical_form_is_read(kind: str) -> None:
    data = OBJECTS[kind].to_json()
    value = json.loads(data)
    forms = [
        data + b"\n",
        json.dumps(value).encode(),
        json.dumps(dict(reversed(value.items())), separators=(",", ":"), ensure_ascii=False).encode(),
        data.replace(b'"format":1', b'"format":1,"format":1'),
    ]
    for form in forms:
        with pytest.raises(CorruptStoreError, match="canonical"):
            type(OBJECTS[kind]).from_json(form)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"1", b"null", b"NaN", b"{", b"[" * 100_000, b'{"a":1e999}', b"9" * 5000]
)
@pytest.mark.parametrize("kind", OBJECTS)
def test_what_is_no_object_is_refused(kind: str, data: bytes) -> None:
    with pytest.raises(CorruptStoreError):
        type(OBJECTS[kind]).from_json(data)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400, -(10**400)])
def test_whole_numbers_have_64_bits(number: int) -> None:
    note = json.loads(OBJECTS["note"].to_json())
    for value in (2**63 - 1, -(2**63)):
        assert Note.from_json(canonical_json({**note, "scores": {"S": value}})).scores == {"S": value}
    with pytest.raises(CorruptStoreError, match="64 bits"):
        Note.from_json(canonical_json({**note, "scores": {"S": number}}))


@pytest.mark.parametrize(
    ("kind", "old", "new", "field"),
    [
        ("patch", A, "A" * 64, "base"),
        ("patch", A, "a" * 63, "base"),
        ("patch", '"closed_form"', '"other"', "kind"),
        ("patch", "[2,3]", "[2]", "weights.w"),
        ("patch", "[2,3]", "[2,-3]", r"weights.w\[1\]"),
        ("commit", TIME, "2026-11-31T09:30:00Z", "time"),
        ("commit", TIME, "2026-11-21T09:30:00", "time"),
        ("commit", f'"{C}","{D}"', f'"{C}",1', r"parents\[1\]"),
        ("commit", '"set":"' + B + '","tensors":null', '"tensors":null', "keyframe.set"),
        ("solved", '"solved":true', '"solved":1', "solved"),
        ("text", "[4]", "[4.0]", r"token_ids\[2\]\[0\]"),
        ("metric", "0.01", '"0.01"', "settings.epsilon"),
        ("metric", '"covariance"', '"euclid"', "kind"),
    ],
)
def test_malformed_values_are_named(kind: str, old: str, new: str, field: str) -> None:
    data = OBJECTS[kind].to_json().decode()
    assert old in data
    with pytest.raises(CorruptStoreError, match=f"field '{field}'"):
        type(OBJECTS[kind]).from_json(data.replace(old, new, 1).encode())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_canonical_json_is_a_function_of_the_value(value: Any) -> None:
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data
    assert json.loads(data) == value
    assert canonical_json(json.loads(json.dumps(value, indent=1))) == data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_canonical_json_has_no_nan_or_infinity(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


ids = st.sampled_from([A, B, C, D])
sets = st.frozensets(st.tuples(ids, ids)) | st.frozensets(st.tuples(ids, st.none()))


@given(sets)
def test_sets_round_trip(elements: frozenset[tuple[str, str | None]]) -> None:
    assert set_from_json(set_json(elements)) == elements
    assert set_json(sorted(elements, key=repr, reverse=True)) == set_json(elements)
    assert set_digest(sorted(elements, key=repr, reverse=True)) == set_digest(elements)
    patches = [group[0] for group in groups_of(elements)]
    assert patches == sorted(set(patches))


@pytest.mark.parametrize(
    "value",
    [
        [[B, None], [A, None]],
        [[A, None], [A, None]],
        [[A, []]],
        [[A, [C, B]]],
        [[A, [B, B]]],
        [[A, None], [A, [B]]],
        [[A]],
        {"a": 1},
    ],
)
def test_only_sorted_sets_are_read(value: Any) -> None:
    with pytest.raises(CorruptStoreError):
        set_from_json(canonical_json(value))


def test_a_patch_is_active_as_a_whole_or_by_request() -> None:
    with pytest.raises(ValueError, match="whole"):
        set_json([(A, None), (A, B)])


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(text, text, text, st.none() | text, st.lists(text, max_size=2), st.lists(st.tuples(text, text), max_size=2))
def test_requests_round_trip(
    start: str, subject: str, target: str, true: str | None, paraphrases: list[str], near: list[tuple[str, str]]
) -> None:
    prompt = start.replace("{}", "") + " {} is"
    try:
        request = Request.make(prompt, subject, target, target_true=true, paraphrases=paraphrases, neighborhood=near)
    except RequestError:
        assert not subject.strip() or not target.strip() or prompt.count("{}") != 1
        return
    assert requests_from_json(requests_json([request, REQUEST])) == [request, REQUEST]
    decomposed = (unicodedata.normalize("NFD", part) for part in (prompt, subject, target))
    assert Request.make(*decomposed).id == request.id


NOTED = dataclasses.replace(REQUEST, metadata={"source": "Libération", "id": 7, "seen": [{"by": None}]})


def test_metadata_stands_with_the_texts_and_changes_no_identity() -> None:
    """Golden bytes; and a list without any has the bytes that it always had."""
    assert object_id(requests_json([NOTED])) == "f0d76b8657ecf592fff3ea748ad38c338261e06681edf7ef10dceaa369ddba8e"
    assert requests_from_json(requests_json([NOTED, REQUEST])) == [NOTED, REQUEST]
    assert NOTED.id == REQUEST.id
    assert len({NOTED, REQUEST}) == 2
    assert b"metadata" not in requests_json([REQUEST])


@pytest.mark.parametrize("metadata", [{}, [], None, "a", {"a": "x" * METADATA_BYTES}, {"a": 2**63}])
def test_metadata_that_writing_would_not_produce_is_refused(metadata: Any) -> None:
    (value,) = json.loads(requests_json([REQUEST]))
    with pytest.raises(CorruptStoreError):
        requests_from_json(canonical_json([{**value, "metadata": metadata}]))


def test_metadata_is_bounded_when_it_is_written() -> None:
    room = METADATA_BYTES - len('{"a":""}')
    requests_json([dataclasses.replace(REQUEST, metadata={"a": "x" * room})])
    with pytest.raises(RequestError, match="longer than 4096"):
        requests_json([dataclasses.replace(REQUEST, metadata={"a": "x" * (room + 1)})])


def test_request_text_and_identity() -> None:
    assert REQUEST.prompt == "The mother tongue of {} is"
    assert REQUEST.text == "The mother tongue of Édith Piaf is"
    assert REQUEST.neighborhood == (Neighbor("The mother tongue of Léon Blum is", "French"),)
    bare = Request.make(" The mother tongue of {} is", "E\u0301dith Piaf ", " English")
    assert bare.id == REQUEST.id
    assert Request.make("The mother tongue of {} is", "Édith Piaf", "German").id != REQUEST.id


@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [
        ("Paris is in", "London", "France"),
        ("Paris, Paris is in", "Paris", "France"),
        ("{} and {} are in", "Paris", "France"),
        ("{} is in", "", "France"),
        ("{} is in", "Paris", " "),
        ("", "Paris", "France"),
        ("{} is in", "Paris", "\ud800"),
    ],
)
def test_requests_that_cannot_be_used_are_refused(prompt: str, subject: str, target: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request.make(prompt, subject, target)
    assert caught.value.remedy


def test_text_is_stored_in_normal_form_and_nothing_else_is_read() -> None:
    note = Note(commit=A, made_by="e\u0301", scores={}, settings={}, suite="s")
    assert Note.from_json(note.to_json()).made_by == "é"
    with pytest.raises(CorruptStoreError, match="canonical"):
        Note.from_json(note.to_json().replace("é".encode(), "e\u0301".encode()))


def test_elements_of_a_patch_follow_its_kind() -> None:
    patch = OBJECTS["patch"]
    assert isinstance(patch, Patch)
    assert patch.elements == {(patch.id, REQUEST.id)}
    shard = Patch.from_json(patch.to_json().replace(b'"closed_form"', b'"shard"'))
    assert shard.elements == {(shard.id, None)}
