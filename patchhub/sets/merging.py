"""Merging of sets: three-way per element, contradictions between the sides, and the file of a stopped merge. Reads JSON only."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Final, Literal

from patchhub.canonical import canonical_json, object_id
from patchhub.errors import CorruptStoreError, RepositoryError, RequestError, SettingsError
from patchhub.fsio import os_errors, write_atomically
from patchhub.objects import Element, Request
from patchhub.results import Result, told
from patchhub.sets.elements import Place, active_requests, places_of
from patchhub.sets.shards import earlier_shards
from patchhub.store.states import Parents, ancestors, merge_bases
from patchhub.store.store import Store

ActiveSet = frozenset[Element]


def three_way(base: ActiveSet, ours: ActiveSet, theirs: ActiveSet) -> ActiveSet:
    """The set that holds what either side changed since ``base``, and what neither did."""
    before, left, right = _by_key(base), _by_key(ours), _by_key(theirs)
    merged = (_winner(left.get(key), right.get(key), before.get(key)) for key in left.keys() | right.keys())
    return frozenset(element for element in merged if element is not None)


def base_set(left: str, right: str, parents: Parents, active: Callable[[str], ActiveSet]) -> ActiveSet:
    """The set that two commits are compared with: that of their merge base, empty (the unpatched model) without one.

    Several merge bases are merged with one another, in ascending order of id, as if a commit had been made of each step.
    """
    tips: list[str] = []
    merged: ActiveSet = frozenset()
    for tip in merge_bases(left, right, parents):
        if tips:
            virtual = "+".join(tips)
            below = _with_commit(f"merge of {virtual}", tuple(tips), parents)
            merged = three_way(base_set(f"merge of {virtual}", tip, below, active), merged, active(tip))
        else:
            merged = active(tip)
        tips.append(tip)
    return merged


def _with_commit(name: str, its_parents: Sequence[str], parents: Parents) -> Parents:
    """The same history with one commit more."""
    return lambda commit: its_parents if commit == name else parents(commit)


def _by_key(elements: ActiveSet) -> dict[str, Element]:
    return {patch if request is None else request: (patch, request) for patch, request in elements}


def _winner(left: Element | None, right: Element | None, before: Element | None) -> Element | None:
    def below(element: Element | None) -> tuple[bool, bool, str]:
        return element == before, element is None, element[0] if element else ""

    return min(left, right, key=below)


Side = Literal["ours", "theirs"]
SIDES: tuple[Side, Side] = ("ours", "theirs")

_PREFIX = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True)
class Claim(Result):
    """What one side says: the request, where it keeps it, and the commit of that side that first wrote it."""

    TOLD: ClassVar = {"target": "target"}

    place: Place = field(metadata=told(omit=True))
    request: Request
    commit: str
    author: str
    time: str
    message: str

    @property
    def target(self) -> str:
        """What is said."""
        return self.request.target_new


@dataclass(frozen=True)
class Contradiction(Result):
    """One prompt and subject to which the two sides give different targets. Each side has at least one claim."""

    text: str
    subject: str
    ours: tuple[Claim, ...]
    theirs: tuple[Claim, ...]

    def words(self) -> str:
        sides = [f"{', '.join(claim.target for claim in self.claims(side))} ({side})" for side in SIDES]
        return f"{self.text} {' or '.join(sides)}"

    def claims(self, side: Side) -> tuple[Claim, ...]:
        return self.ours if side == "ours" else self.theirs


@dataclass(frozen=True)
class Found:
    """The contradictions of a merge, and how many facts could not be checked because their texts are withheld."""

    contradictions: tuple[Contradiction, ...]
    unchecked: int


@dataclass(frozen=True)
class Resolution:
    """How contradictions are decided.

    Attributes:
        choices: per fact, by its text ("The mother tongue of Ada is") or by a request id or a prefix of one (4 digits or more):
            "ours", "theirs", or the target that shall stay.
        prefer: the side for all others; None leaves them open.
    """

    choices: Mapping[str, str] = field(default_factory=dict)
    prefer: Side | None = None


@dataclass(frozen=True)
class Decided:
    """What a resolution makes of the contradictions: where facts are to be left out, the side of each, and those still open."""

    dropped: frozenset[Place]
    sides: Mapping[Contradiction, Side]
    open: tuple[Contradiction, ...]


def resolution_of(choices: Path | Mapping[str, str] | None, *, ours: bool = False, theirs: bool = False) -> Resolution:
    """The resolution that options ask for.

    Args:
        choices: `Resolution.choices`, or a JSON file of them.
        ours, theirs: decide all others for one side.

    Raises:
        SettingsError: both sides are asked for.
        RequestError: the file cannot be read.
    """
    if ours and theirs:
        raise SettingsError(
            "--ours and --theirs are both given", remedy="Give one, or decide one by one with --choices."
        )
    found = read_choices(choices) if isinstance(choices, Path) else choices or {}
    return Resolution(found, "ours" if ours else "theirs" if theirs else None)


def read_choices(path: Path) -> dict[str, str]:
    """The choices in a JSON file: one object, fact to "ours", "theirs" or a target.

    Raises:
        RequestError: the file cannot be read as that.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"the choices in {path} cannot be read ({error})", remedy=_CHOICES) from error
    if not isinstance(value, dict) or not all(isinstance(choice, str) for choice in value.values()):
        raise RequestError(f"the choices in {path} are not a JSON object of text to text", remedy=_CHOICES)
    return value


_CHOICES = 'Write {"The mother tongue of Ada is": "theirs", ...}: ours, theirs, or the target that shall stay.'


def find(
    repository: Store,
    merged: frozenset[Element],
    ours: tuple[str, frozenset[Element]],
    theirs: tuple[str, frozenset[Element]],
) -> Found:
    """Contradictions between what a merged set has from one side alone and what it has from the other alone.

    ``ours`` and ``theirs`` are the commits and their sets. Facts that contradict each other within one side were put side by side there on
    purpose, and are left alone.
    """
    alone = {"ours": merged - theirs[1], "theirs": merged - ours[1]}
    texts = {side: active_requests(repository, elements) for side, elements in alone.items()}
    here, there = (_by_fact(texts[side]) for side in SIDES)
    pairs = {fact: (here[fact], there[fact]) for fact in here.keys() & there.keys() if _differ(here[fact], there[fact])}
    histories = [ancestors([side[0]], repository.parents) if pairs else set() for side in (ours, theirs)]
    contradictions = [
        Contradiction(
            prompt.replace("{}", subject),
            subject,
            *(_claims(repository, history, said) for history, said in zip(histories, pair, strict=True)),
        )
        for (prompt, subject), pair in sorted(pairs.items())
    ]
    wordless = [places_of(repository, alone[side]) - texts[side].keys() for side in SIDES]
    withheld = sum(fact is not None for places in wordless for _, fact in places)  # an imported change holds no facts
    return Found(tuple(contradictions), withheld)


def decide(contradictions: Iterable[Contradiction], resolution: Resolution) -> Decided:
    """Apply a resolution.

    Raises:
        RequestError: a choice names no contradiction of this merge, or neither a side nor one of its targets.
    """
    contradictions = tuple(contradictions)
    sides: dict[Contradiction, Side] = {}
    if resolution.prefer is not None:
        sides = dict.fromkeys(contradictions, resolution.prefer)
    for name, choice in resolution.choices.items():
        found = _named(name, contradictions)
        sides[found] = _side(found, choice)
    dropped = {
        claim.place for found, side in sides.items() for claim in found.claims("theirs" if side == "ours" else "ours")
    }
    return Decided(frozenset(dropped), sides, tuple(found for found in contradictions if found not in sides))


def _differ(here: Iterable[tuple[Place, Request]], there: Iterable[tuple[Place, Request]]) -> bool:
    """Whether two sides say different things of one prompt and subject; shards of both may hold the same fact."""
    left, right = ({request.id for _, request in side} for side in (here, there))
    return bool(left - right and right - left)


def _claims(repository: Store, history: set[str], items: Iterable[tuple[Place, Request]]) -> tuple[Claim, ...]:
    """What a side says, given its commits: each request with the earliest of them that put it where it is."""
    claims = []
    for place, request in items:
        line = {place[0], *earlier_shards(repository, place[0])}
        changes = repository.changes_of(request.id)
        wrote = [commit for commit, patch, sign in changes if sign > 0 and patch in line and commit in history]
        commit = repository.commit(wrote[-1])
        claims.append(Claim(place, request, wrote[-1], commit.author, commit.time, commit.message))
    return tuple(claims)


def _by_fact(requests: Mapping[Place, Request]) -> dict[tuple[str, str], list[tuple[Place, Request]]]:
    facts: dict[tuple[str, str], list[tuple[Place, Request]]] = {}
    for place, request in requests.items():
        facts.setdefault((request.prompt, request.subject), []).append((place, request))
    return facts


def _named(name: str, contradictions: tuple[Contradiction, ...]) -> Contradiction:
    found = [c for c in contradictions if c.text == name]
    if not found and _PREFIX.fullmatch(name):
        found = [c for c in contradictions if any(x.request.id.startswith(name) for x in (*c.ours, *c.theirs))]
    if len(found) == 1:
        return found[0]
    close = difflib.get_close_matches(name, [c.text for c in contradictions], n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else "Write a fact as the merge lists it, or its request id."
    problem = "names more than one contradiction" if found else "names no contradiction"
    raise RequestError(f"the choice {name!r} {problem} of this merge", remedy=remedy, choice=name)


def _side(found: Contradiction, choice: str) -> Side:
    for side in SIDES:
        if choice == side or choice in {claim.request.target_new for claim in found.claims(side)}:
            return side
    targets = sorted({claim.request.target_new for side in SIDES for claim in found.claims(side)})
    raise RequestError(
        f"the choice {choice!r} for {found.text!r} is neither a side nor one of its targets",
        remedy=f"Write ours, theirs, {' or '.join(targets)}.",
        choice=choice,
    )


FILE: Final = "merge.json"
_FORMAT: Final = 1


@dataclass(frozen=True)
class StoppedMerge(Result):
    """A merge that waits for its contradictions to be decided.

    Attributes:
        ours, theirs: the commits that are merged.
        revision: how the user named theirs.
        message: the message that the merge commit will have.
    """

    ours: str
    theirs: str
    revision: str
    message: str


def stopped_merge(repository: Store) -> StoppedMerge | None:
    """The merge that waits on the present commit. One that HEAD has left is over, whatever the file says.

    Raises:
        CorruptStoreError: the file cannot be read.
    """
    path = repository.root / FILE
    if not path.is_file():
        return None
    found = _read(path)
    return found if repository.head[1] == found.ours else None


def refuse_stopped(repository: Store) -> None:
    """Raise `RepositoryError` where a merge waits on the present commit: another commit would abandon it."""
    waiting = stopped_merge(repository)
    if waiting is not None:
        raise RepositoryError(
            f"the merge of {waiting.revision} waits for its contradictions to be decided",
            remedy="Take it up with `patchhub merge --continue`, or leave it with `patchhub merge --abort`.",
            revision=waiting.revision,
            theirs=waiting.theirs,
        )


def keep(repository: Store, merge: StoppedMerge) -> None:
    """Write the file, in one step."""
    document = canonical_json({**merge.to_json(), "digest": _digest(merge), "format": _FORMAT})
    with repository.locked():
        write_atomically(repository.root / FILE, [document])


def forget(repository: Store) -> bool:
    """Remove the file; whether there was one."""
    path = repository.root / FILE
    with repository.locked():
        present = path.is_file()
        with os_errors(path):
            path.unlink(missing_ok=True)
    return present


def _digest(merge: StoppedMerge) -> str:
    return object_id(canonical_json(merge.to_json()))


def _read(path: Path) -> StoppedMerge:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = value.pop("digest", None)  # not there in those of earlier versions
        if value.pop("format") != _FORMAT or value.keys() != {field.name for field in fields(StoppedMerge)}:
            raise ValueError("its fields are not those of format 1")
        found = StoppedMerge(**{name: str(text) for name, text in value.items()})
        if digest not in (None, _digest(found)):
            raise ValueError("it is not as it was written")
        return found
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"{path} cannot be read: {error}", remedy="Run `patchhub merge --abort`, then merge again.", path=str(path)
        ) from error
