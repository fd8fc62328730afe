"""Reachability over a few objects in memory."""

from __future__ import annotations

import dataclasses

import pytest

from patchhub.errors import CorruptStoreError
from patchhub.objects import EMPTY_SET, Base, Commit, Element, Keyframe, Metric, Note, Patch, Text, set_digest, set_json
from patchhub.store.database import Changes
from patchhub.store.states import Reference, closure, missing, recorded, references
from tests.store.memory import MemoryObjects

TIME = "2026-11-21T09:30:00Z"
OBJECTS = MemoryObjects()
BASE = OBJECTS.put(Base(architecture={}, tensors={}).to_json())
TEXT = OBJECTS.put(Text(token_ids=((1,),)).to_json())
SAMPLED = Metric(BASE, "covariance", {"epsilon": 0.01}, {"kind": "sampled"}, TEXT, tokens=1, truncation=1)
METRIC = OBJECTS.put(SAMPLED.to_json())
COLUMNS, DELTA, WHOLE, TEXTS = (OBJECTS.put(data) for data in (b"columns", b"delta", b"whole", b"[]"))
PATCH = Patch(
    base=BASE,
    kind="additive",
    made_on=None,
    method="import",
    metric=METRIC,
    requests=(),
    requests_blob=TEXTS,
    settings={},
    tensors=COLUMNS,
    weights={},
)
ELEMENTS: frozenset[Element] = frozenset([(OBJECTS.put(PATCH.to_json()), None)])
SET = OBJECTS.put(set_json(ELEMENTS))
ROOT = Commit(
    added=ELEMENTS,
    author="Ada",
    base=BASE,
    check={},
    keyframe=Keyframe(SET, WHOLE),
    message="",
    metric=METRIC,
    parents=(),
    removed=frozenset(),
    same_as=None,
    set_digest=set_digest(ELEMENTS),
    tensors=DELTA,
    time=TIME,
)
TIP = dataclasses.replace(
    ROOT, added=frozenset(), removed=ELEMENTS, keyframe=None, parents=(ROOT.id,), set_digest=EMPTY_SET, tensors=None
)
NOTE = Note(commit=TIP.id, made_by="", scores={}, settings={}, suite="")
for item in (ROOT, TIP, NOTE):
    OBJECTS.put(item.to_json())


def follow(reference: Reference) -> list[Reference]:
    return references(reference.kind, OBJECTS.get(reference.id))


def test_everything_is_reachable_from_the_note_and_children_come_first() -> None:
    reached = list(closure([Reference("note", NOTE.id)], follow))
    assert sorted(reference.id for reference in reached) == list(OBJECTS.ids())
    kinds = [reference.kind for reference in reached]
    assert kinds.index("note") < kinds.index("commit") < kinds.index("patch") < kinds.index("requests")


def test_closure_stops_where_nothing_is_followed() -> None:
    roots = [Reference("commit", TIP.id), Reference("commit", TIP.id)]
    assert list(closure(roots, lambda _: [])) == roots[:1]


def test_text_is_needed_only_where_it_was_sampled() -> None:
    assert Reference("text", TEXT) in references("metric", SAMPLED.to_json())
    own = dataclasses.replace(SAMPLED, source={"kind": "file"})
    assert references("metric", own.to_json()) == [Reference("base", BASE)]


def test_bytes_of_another_kind_are_refused() -> None:
    with pytest.raises(CorruptStoreError):
        references("commit", PATCH.to_json())
    assert references("tensors", b"anything") == []


@pytest.mark.parametrize("kind", ["base", "metric", "patch", "set", "tensors", "requests"])
def test_missing_names_each_lack_but_withheld_texts(kind: str) -> None:
    wanted = [reference for reference in closure([Reference("commit", ROOT.id)], follow) if reference.kind == kind]
    assert wanted
    for reference in wanted:
        lacking = set(missing(ROOT, lambda _: PATCH, reference.id.__ne__))
        assert lacking == (set() if kind == "requests" else {reference})


def test_recorded_names_old_and_new_targets() -> None:
    changes: list[Changes] = [
        {"HEAD": (None, "ref: refs/heads/main")},
        {"refs/heads/main": (ROOT.id, TIP.id), "refs/notes/x": (None, NOTE.id)},
    ]
    assert recorded(changes) == {
        Reference("commit", ROOT.id),
        Reference("commit", TIP.id),
        Reference("note", NOTE.id),
    }
