"""`report`: one self-contained HTML page about a repository; docs/report.md says what is on it. No model runs.

Its facts are all requests that its commits ever added or removed; its scores are what was noted about its commits; the history below every
name is a drawing. Template, style, script and data are one file that loads nothing.

The texts on the page are user input. They are in the file only as JSON inside a data block, with every character that could end the block
escaped, and the script puts them on the page as text nodes. The page's policy allows this style and this script alone, by their hashes, and
no connection; `require-trusted-types-for` has the browser refuse any assignment of markup."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from patchhub.errors import SettingsError
from patchhub.evaluation.guard import Report as Guarded
from patchhub.fsio import os_errors, write_atomically
from patchhub.objects import Commit, Element
from patchhub.porcelain.scores import (
    DEFINITIONS,
    Noted,
    Score,
    base_norms,
    guard,
    norms,
    noted_commits,
    notes_of,
    numbers,
    read_note,
)
from patchhub.progress import Progress
from patchhub.results import Result, told
from patchhub.sets.elements import count_changed
from patchhub.store import lookup, states
from patchhub.store.lookup import Fact, every_change, every_fact
from patchhub.store.revisions import BRANCHES, HEAD, REMOTES, SYMBOLIC, TAGS
from patchhub.store.store import Store, refuse_store

if TYPE_CHECKING:
    from patchhub.sets.rivals import Overlap


_SCRIPTS: Final = (
    "elements.js",
    "plots.js",
    "history.js",
    "facts.js",
    "scores.js",
    "weights.js",
    "overlaps.js",
    "guard.js",
    "main.js",
)
_POLICY: Final = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_UNSAFE: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
GENERATOR: Final = '<meta name="generator" content="patchhub report">'


def render(document: Mapping[str, Any], *, title: str) -> bytes:
    """The page of a document as UTF-8; the same bytes for the same document.

    Raises:
        ValueError: the document is not JSON.
    """
    style = _part("page.css")
    script = "\n".join(['"use strict";', *map(_part, _SCRIPTS)])
    page = Template(_part("page.html")).substitute(
        generator=GENERATOR,
        policy=_POLICY.format(script=_hash(script), style=_hash(style)),
        title=escape(title),
        style=style,
        data=data_block(document),
        script=script,
    )
    return page.encode()


def data_block(document: Any) -> str:
    """JSON that stays inside a script element, whatever strings it holds: no ``<``, so neither ``</script`` nor ``<!--``."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_UNSAFE)


def is_page(file: Path) -> bool:
    """Whether a file begins as a page of `render` does."""
    with open(file, "rb") as opened:
        return GENERATOR.encode() in opened.read(512)


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@dataclass(frozen=True)
class Place:
    """One commit in the drawing.

    Attributes:
        track: its column.
        lines: (column at this commit's row, column at the next row) of every line between the two.
    """

    track: int
    lines: tuple[tuple[int, int], ...]


def lay_out(commits: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Place]:
    """One place per commit.

    A track waits for one commit, and no commit is waited for twice. A commit's track goes on to its first parent; where another track
    waits for that one already, the two become one in the column further left. Further parents take the leftmost free columns.

    Args:
        commits: (id, ids of its parents), every child before its parents. A parent that does not come is waited for to the end.
    """
    waiting: list[str | None] = []
    for commit, parents in commits:
        track = waiting.index(commit) if commit in waiting else _free(waiting)
        waiting[track] = None
        before = list(waiting)
        for parent in dict.fromkeys(parents):
            if parent not in waiting:
                column = track if waiting[track] is None else _free(waiting)
            elif waiting[track] is None and waiting.index(parent) > track:
                waiting[waiting.index(parent)] = None
                column = track
            else:
                continue
            waiting[column] = parent
        passing = [(column, waiting.index(awaited)) for column, awaited in enumerate(before) if awaited is not None]
        onward = [(track, waiting.index(parent)) for parent in dict.fromkeys(parents)]
        yield Place(track, (*passing, *onward))


def _free(waiting: list[str | None]) -> int:
    """The leftmost column that waits for nothing, made if there is none."""
    if None not in waiting:
        waiting.append(None)
    return waiting.index(None)


_KINDS = {BRANCHES: "branch", TAGS: "tag", REMOTES: "remote"}


@dataclass(frozen=True)
class CommitRow:
    """One commit.

    Attributes:
        labels: (kind, name) of what points to it: branch, tag, remote, or head where HEAD names the commit itself.
        methods: the editors of the patches that it adds from.
        added, removed: how many facts; an additive patch counts as one.
        active: the number of active facts.
        place: where it is in the drawing.
    """

    id: str
    commit: Commit
    labels: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    added: int
    removed: int
    active: int
    place: Place

    def to_json(self, places: Mapping[str, int], weights: Sequence[str]) -> dict[str, Any]:
        """For the page: parents by their place there, norms relative to the base's weight in the order of ``weights``."""
        commit, check = self.commit, self.commit.check
        state, change = (norms(check, kind) for kind in ("state", "change"))
        return {
            "id": self.id,
            "parents": [places.get(parent, parent[:12]) for parent in commit.parents],
            "author": commit.author,
            "time": commit.time,
            "message": commit.message,
            "labels": [list(label) for label in self.labels],
            "methods": list(self.methods),
            "added": self.added,
            "removed": self.removed,
            "active": self.active,
            "track": self.place.track,
            "lines": [list(line) for line in self.place.lines],
            "state": [state.get(weight) for weight in weights],
            "change": [change.get(weight) for weight in weights],
            "proof": max(numbers(check, "proof"), default=None),
            "survival": min(numbers(check, "survival"), default=None),
            "guard": guard(check),
        }


def reachable(repository: Store, *also: str | None) -> list[str]:
    """Every commit below a branch, a tag, a remote branch or ``also``, newest first, every child before its parents."""
    known = lookup.whole_graph(repository)
    starts = {commit for commit in (*_labels(repository), *also) if commit is not None}
    return list(states.walk(starts, lambda commit: known[commit][1], lambda commit: known[commit][0]))


def commit_rows(repository: Store, commits: Sequence[str]) -> Iterator[CommitRow]:
    """The rows of commits that come every child before its parents.

    Raises:
        CorruptStoreError: a commit, or a patch that it adds to, is damaged.
    """
    labels = _labels(repository)
    loaded = [(identity, repository.commit(identity)) for identity in commits]
    drawing = lay_out((identity, commit.parents) for identity, commit in loaded)
    for (identity, commit), place in zip(loaded, drawing, strict=True):
        methods = {repository.patch(patch).method for patch in {patch for patch, _ in commit.added}}
        removed, added = count_changed(repository, commit.removed, commit.added)
        yield CommitRow(
            identity,
            commit,
            tuple(labels.get(identity, ())),
            tuple(sorted(methods)),
            added,
            removed,
            repository.active_count(identity),
            place,
        )


def edited_weights(rows: Iterable[CommitRow]) -> dict[str, float]:
    """The norm of the base's weight for every weight that a commit measured, in the order of their layers."""
    bases = {name: norm for row in rows for name, norm in base_norms(row.commit.check).items()}
    return dict(sorted(bases.items(), key=lambda item: _in_order(item[0])))


def _in_order(weight: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in weight.split(".")]


def _labels(repository: Store) -> dict[str, list[tuple[str, str]]]:
    """For each commit the names that point to it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for ref, target in sorted(repository.refs().items()):
        kind = next((prefix for prefix in _KINDS if ref.startswith(prefix)), None)
        if kind is not None:
            found.setdefault(target, []).append((_KINDS[kind], ref.removeprefix(kind)))
        elif ref == HEAD and not target.startswith(SYMBOLIC):
            found.setdefault(target, []).append(("head", HEAD))
    return found


@dataclass(frozen=True)
class FactRow:
    """One request.

    Attributes:
        texts: the request in words; None where they are withheld.
        changes: (place of the commit on the page, +1 added, -1 removed, 0 recorded again), the earliest first; commits that are
            not on the page are left out.
        last: the order of its last change among all changes; larger is later.
        column: the recorded columns that are active; None where it is not active, or only as part of a whole patch.
        active: whether the state holds it.
    """

    FIELDS: ClassVar = ("id", "prompt", "subject", "target_new", "target_true", "active", "misfit", "changes")

    id: str
    texts: Fact | None
    changes: tuple[tuple[int, int], ...]
    last: int
    column: Element | None
    active: bool

    def to_json(self, misfit: float | None) -> list[Any]:
        """The row in the order of `FIELDS`; the id cut to the length that names it on the page."""
        words = self.texts
        texts = [None] * 4 if words is None else [words.prompt, words.subject, words.target_new, words.target_true]
        share = None if misfit is None else round(misfit, 4)
        return [self.id[:16], *texts, int(self.active), share, [list(change) for change in self.changes]]


def fact_rows(
    repository: Store, active: AbstractSet[Element], reachable: AbstractSet[str], places: Mapping[str, int]
) -> list[FactRow]:
    """Every request that a reachable commit added or removed, the last changed first.

    Args:
        active: the active set that the page is about.
        reachable: ids of the commits that count.
        places: for those that are on the page, their place there.
    """
    steps: dict[str, dict[str, int]] = {}
    last: dict[str, int] = {}
    for moment, (commit, _, request, change) in enumerate(every_change(repository)):
        if commit not in reachable:
            continue
        found = steps.setdefault(request, {})
        found[commit] = found.get(commit, 0) + change
        last[request] = moment
    texts = {fact.request: fact for fact in every_fact(repository)}
    columns = {element[1]: element for element in active if element[1] is not None}
    whole = {request for patch, one in active if one is None for request in repository.patch(patch).requests}
    rows = [
        FactRow(
            request,
            texts.get(request),
            tuple((places[commit], max(-1, min(1, change))) for commit, change in found.items() if commit in places),
            last[request],
            columns.get(request),
            request in columns or request in whole,
        )
        for request, found in steps.items()
    ]
    return sorted(rows, key=lambda row: (-row.last, row.id))


@dataclass(frozen=True)
class ScoreRow:
    """One note, and the place of its commit on the page."""

    commit: int
    noted: Noted

    def to_json(self) -> dict[str, Any]:
        """Each score as [value, low, high, the base's], null for what is not known."""
        found = self.noted
        facts = f"{found.facts:,} fact{'' if found.facts == 1 else 's'}" if found.facts else ""
        return {
            "commit": self.commit,
            "suite": found.suite,
            "title": ", ".join(filter(None, [found.kind, found.file, facts])),
            "made_by": found.made_by,
            "scores": {name: _row(score) for name, score in found.scores.items()},
        }


def score_rows(repository: Store, places: Mapping[str, int]) -> Iterator[ScoreRow]:
    """The notes about commits that are on the page, the newest commit first."""
    noted = noted_commits(repository.refs())
    for commit, place in sorted(places.items(), key=lambda item: item[1]):
        for identity in noted.get(commit, ()):
            yield ScoreRow(place, read_note(identity, repository.note(identity)))


def _row(score: Score) -> list[float | None]:
    bounds = (score.value, score.low, score.high, score.base)
    return [None if bound is None else float(f"{bound:.5g}") for bound in bounds]


COMMITS: Final = 5_000
FACTS: Final = 50_000
"""What a page holds at most, the newest first."""
OVERLAPS: Final = 200
COMPARED: Final = 1_000
"""Comparing facts takes their number squared: with 1,000 of them seconds on a model of 1,000 dimensions."""


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        name: the folder that holds the store.
        made: the instant at which this was gathered.
        base: id and model type.
        branch: the current one; None where HEAD is detached.
        revision: the name of the commit at which facts count as active, and ``commit`` its id; None for the unpatched model.
        commits: those below any branch, tag or remote branch and below the revision, newest first.
        facts: every request that one of them added or removed, the last changed first.
        scores: the latest note of each commit and suite.
        overlaps, pairs: the pairs of active facts with the nearest keys, and how many there are; see `crowding`.
        misfits: by request id, of the active facts that were compared.
        left_out: how many commits and facts the page does not hold.
    """

    name: str
    made: str
    base: Mapping[str, str]
    branch: str | None
    revision: str
    commit: str | None
    commits: tuple[CommitRow, ...]
    facts: tuple[FactRow, ...]
    scores: tuple[ScoreRow, ...]
    overlaps: tuple[Overlap, ...]
    pairs: int
    misfits: Mapping[str, float]
    left_out: Mapping[str, int]
    verdict: tuple[str, list[tuple[Level, str]]]

    def to_json(self) -> dict[str, Any]:
        """The document that the page's script reads. Commits and facts are named by their place in the lists."""
        places = {row.id: place for place, row in enumerate(self.commits)}
        facts = {row.id: place for place, row in enumerate(self.facts)}
        weights = edited_weights(self.commits)
        return {
            "name": self.name,
            "made": self.made,
            "base": dict(self.base),
            "branch": self.branch,
            "revision": self.revision,
            "commit_id": self.commit,
            "commit": None if self.commit is None else places.get(self.commit),
            "weights": [[name, float(f"{norm:.6g}")] for name, norm in weights.items()],
            "commits": [row.to_json(places, list(weights)) for row in self.commits],
            "fact_fields": list(FactRow.FIELDS),
            "facts": [row.to_json(self.misfits.get(row.id)) for row in self.facts],
            "scores": [row.to_json() for row in self.scores],
            "compared": len(self.misfits),
            "pairs": self.pairs,
            "overlaps": [
                [facts[pair.left], facts[pair.right], pair.weight, pair.key_cosine, pair.residual_cosine]
                for pair in self.overlaps
            ],
            "verdict": self.verdict,
            "definitions": {
                name: DEFINITIONS[name] for name in DEFINITIONS if any(name in row.noted.scores for row in self.scores)
            },
            "left_out": dict(self.left_out),
        }


Level = Literal["good", "doubtful", "bad"]
_WORDS: Final[Mapping[Level | None, str]] = {
    "good": "This model is fine, as far as was measured.",
    "doubtful": "This model is mostly fine; what is marked below deserves a look.",
    "bad": "This model is not fine: see what is marked below.",
    None: "Nobody has measured yet whether this model is fine.",
}


def verdict(
    check: Mapping[str, Any] | None, scores: Mapping[str, Mapping[str, float]]
) -> tuple[str, list[tuple[Level, str]]]:
    """Whether the shown model is fine, in a sentence, and what that rests on, the worst first.

    Args:
        check: what was measured when the shown commit was made; None: the unpatched model.
        scores: what was noted about it later: by suite, such as "30 facts of facts.json", then by name. A suite may be of facts
            that were never written, so scores alone make a model doubtful, not bad.
    """
    if check is None:
        return "This is the unpatched model.", []
    found = [*_guarded(check), *(line for suite, values in scores.items() for line in _scored(suite, values))]
    order = {"bad": 0, "doubtful": 1, "good": 2}
    found.sort(key=lambda line: order[line[0]])
    return _WORDS[found[0][0] if found else None], found


def _judged(repository: Store, commit: str | None) -> tuple[str, list[tuple[Level, str]]]:
    """The verdict on a commit, from its check and its notes."""
    if commit is None:
        return verdict(None, {})
    notes = notes_of(repository, commit)
    about = {f"{_facts(noted.facts)} of {noted.file or noted.suite}": noted.scores for noted in notes}
    values = {suite: {name: score.value for name, score in scores.items()} for suite, scores in about.items()}
    return verdict(repository.commit(commit).check, values)


def _guarded(check: Mapping[str, Any]) -> Iterator[tuple[Level, str]]:
    report = Guarded.from_json(check)
    if report is None:
        return
    for failed in report.failed:
        yield "bad", f"It was committed although the guard refused it: {failed}."
    own, earlier, drift = report.measured.own, report.measured.earlier, report.measured.drift
    if own and own.of:
        yield (
            _above(own.count / own.of, 0.9, 0.5),
            f"Of the last commit's {_facts(own.of)} it answers with {own.count}.",
        )
    if earlier and earlier.of and earlier.count:
        yield (
            _above(1 - earlier.count / earlier.of, 0.95, 0.8),
            f"Of {_facts(earlier.of)} from before that were read, {earlier.count} got lost.",
        )
    if drift and not drift.guessing:
        ratio = drift.perplexity_ratio
        yield _above(-ratio, -1.05, -1.25), f"On other text its perplexity is {ratio:.3f} times that of the base."


def _scored(suite: str, scores: Mapping[str, float]) -> Iterator[tuple[Level, str]]:
    for name, good, words in (
        ("live_efficacy", 0.9, "Of the {} it says {:.0%} by itself."),
        ("live_paraphrase", 0.4, "Of the {}, asked in other words, it says {:.0%}."),
    ):
        if name in scores:
            yield "good" if scores[name] >= good else "doubtful", words.format(suite, scores[name])
    if "leak" in scores:
        level: Level = "good" if scores["leak"] <= 0.05 else "doubtful"
        yield level, f"Of other subjects' prompts beside the {suite}, {scores['leak']:.0%} say a new answer now."


def _facts(number: int) -> str:
    return f"{number} fact{'' if number == 1 else 's'}"


def _above(value: float, good: float, passable: float) -> Level:
    return "good" if value >= good else "doubtful" if value >= passable else "bad"


def _counts(found: Report) -> dict[str, Any]:
    return {
        "commits": len(found.commits),
        "facts": len(found.facts),
        "scores": len(found.scores),
        "left_out": found.left_out,
    }


@dataclass(frozen=True)
class Written(Result):
    """The file of a report and its bytes."""

    out: Path
    size: int = field(metadata=told(name="bytes"))
    report: Report = field(metadata=told(inline=True, by=_counts))


def write_report(
    repository: Store,
    out: Path,
    progress: Progress,
    *,
    time: str,
    revision: str = HEAD,
    compared: int = COMPARED,
    overwrite: bool = False,
) -> Written:
    """Write the page of `report` to the file `out`, in one step; a page that was written there before is replaced.

    Raises:
        RevisionError: no such revision.
        SettingsError: `out` is a folder; or something else is there, and not `overwrite`.
        RepositoryError: the disk refuses the write.
    """
    refuse_store(repository, out)
    _refuse_loss(out, overwrite=overwrite)
    found = report(repository, progress, time=time, revision=revision, compared=compared)
    data = render(found.to_json(), title=f"{found.name}: what was taught, when, and by whom")
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (data,))
    left = found.left_out
    if any(left.values()):
        progress.warn(f"the page leaves out {left['commits']:,} older commits and {left['facts']:,} facts")
    progress.close()
    return Written(out, len(data), found)


def report(
    repository: Store, progress: Progress, *, time: str, revision: str = HEAD, compared: int = COMPARED
) -> Report:
    """What the page shows.

    Args:
        time: the present instant, which the page names.
        revision: where a fact counts as active.
        compared: at most so many active facts, the last changed ones, are compared with one another; 0 needs no NumPy.

    Raises:
        RevisionError: no such revision.
        CorruptStoreError: an object that the page needs is damaged.
    """
    commit = repository.resolve(revision)
    progress.stage("reading the history", 0)
    every = reachable(repository, commit)
    commits = tuple(commit_rows(repository, every[:COMMITS]))
    places = {row.id: place for place, row in enumerate(commits)}
    facts = fact_rows(repository, repository.active(commit), set(every), places)
    shown = tuple(facts[:FACTS])
    overlaps, pairs, misfits = _compared(repository, commit, shown, progress, compared)
    config = repository.config
    return Report(
        name=_readable(repository.root.absolute().parent.name),
        made=time,
        base={"id": config.base_id, "model_type": str(config.base.get("model_type", ""))},
        branch=repository.head[0],
        revision=revision,
        commit=commit,
        commits=commits,
        facts=shown,
        scores=tuple(score_rows(repository, places)),
        overlaps=overlaps,
        pairs=pairs,
        misfits=misfits,
        left_out={"commits": len(every) - len(commits), "facts": len(facts) - len(shown)},
        verdict=_judged(repository, commit),
    )


def _compared(
    repository: Store, commit: str | None, facts: tuple[FactRow, ...], progress: Progress, limit: int
) -> tuple[tuple[Overlap, ...], int, Mapping[str, float]]:
    """Overlaps, how many pairs overlap, and misfits, of the last changed active facts."""
    columns: list[Element] = [row.column for row in facts if row.column is not None][:limit]
    if commit is None or not columns:
        return (), 0, {}
    from patchhub.sets.rivals import crowding

    found = crowding(repository, commit, frozenset(columns), progress, shown=OVERLAPS)
    return found.overlaps, found.pairs, found.misfits


def _readable(name: str) -> str:
    """A file name as text; bytes that are none, which Python keeps as surrogates, become question marks."""
    return name.encode(errors="replace").decode()


def _refuse_loss(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise SettingsError(f"{out} is a folder", remedy=f"Name a file, such as {out / 'report.html'}.")
    if out.exists() and not overwrite and not is_page(out):
        raise SettingsError(
            f"{out} is there already and is no report", remedy="Choose another place, or --overwrite.", path=str(out)
        )
