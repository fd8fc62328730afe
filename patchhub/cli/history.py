"""Commands that look at history: log, show, status; and the history as a drawing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from math import acos, degrees
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from patchhub.cli.find import list_found
from patchhub.cli.measure import measured_on, say_compared, say_scores, score_line, summary
from patchhub.cli.options import (
    Revision,
    Shown,
    allowed_option,
    guard_lines,
    guard_summary,
    short_signatures,
    signature_line,
)
from patchhub.cli.terminal import (
    ago,
    count,
    json_option,
    local,
    opened,
    paged,
    print_json,
    repo_option,
    reports_errors,
    say,
    say_all,
    say_metadata,
)
from patchhub.errors import CorruptStoreError, RevisionError, SettingsError
from patchhub.porcelain.scores import DEFINITIONS
from patchhub.results import Rows

if TYPE_CHECKING:
    from patchhub.objects import Patch, Request
    from patchhub.porcelain.history import Divergence, Entry, Size
    from patchhub.porcelain.history import Shown as ShownCommit
    from patchhub.porcelain.search import ChangedAnswer, Difference, WeightStep


@dataclass(frozen=True)
class Drawing:
    """One commit: its own row, the rows that lead to the lanes after it, and a row of those lanes."""

    commit: str
    edges: tuple[str, ...]
    lanes: str

    def beside(self, lines: Sequence[str]) -> Iterator[str]:
        """The drawing with text to its right: the first line at the commit, the others at edges and lanes."""
        rows = [self.commit, *self.edges]
        rows += [self.lanes] * (len(lines) - len(rows))
        width = max(map(len, [*rows, self.lanes])) + 1
        for row, line in zip(rows, [*lines, *[""] * (len(rows) - len(lines))], strict=True):
            yield f"{row:<{width}}{line}".rstrip()


def draw(commits: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Drawing]:
    """One drawing per commit.

    Each lane waits for one commit. A commit's lane goes on to its first parent, further lanes open to its right for other
    parents, and a lane whose parent another one waits for already joins that one.

    Args:
        commits: (id, ids of its parents), every child before its parents.
    """
    lanes: list[str] = []
    for commit, parents in commits:
        if commit not in lanes:
            lanes.append(commit)
        place = lanes.index(commit)
        fresh = [parent for parent in dict.fromkeys(parents) if parent not in lanes]
        after = [*lanes[:place], *fresh, *lanes[place + 1 :]]
        edges = [(column, after.index(lane)) for column, lane in enumerate(lanes) if column != place]
        edges += [(place, after.index(parent)) for parent in dict.fromkeys(parents)]
        row = " ".join("*" if column == place else "|" for column in range(len(lanes)))
        yield Drawing(row, tuple(_transition(edges)), " ".join("|" for _ in after))
        lanes = after


def _transition(edges: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Rows in which every edge (column now, column wanted) moves at most one column, until all have arrived."""
    moving = set(edges)
    while any(here != wanted for here, wanted in moving):
        cells: dict[int, str] = {}
        for here, wanted in moving:
            step = (wanted > here) - (wanted < here)
            sign = {-1: "/", 0: "|", 1: "\\"}[step]
            cell = 2 * here + step
            cells[cell] = sign if cells.get(cell, sign) == sign else "X"
        moving = {(here + (wanted > here) - (wanted < here), wanted) for here, wanted in moving}
        yield "".join(cells.get(cell, " ") for cell in range(max(cells) + 1))


_SHOWN = 20


@click.command()
@click.argument("rev", default="HEAD", type=Revision())
@click.option("-n", "--limit", type=click.IntRange(min=1), help="At most this many commits.")
@click.option("--all", is_flag=True, help="The commits below every branch, tag and remote branch.")
@click.option("--oneline", is_flag=True, help="One line a commit.")
@click.option(
    "--format",
    "--pretty",
    "form",
    metavar="TEXT",
    help="Print TEXT for each, with %h, %H, %s, %b, %an, %ae, %ad, %d, %n, or oneline.",
)
@click.option("--graph", is_flag=True, help="Draw branches and merges to the left.")
@click.option("--stat", is_flag=True, help="Say how much each commit changes: bytes, and the weight it changes most.")
@click.option("-S", "about", metavar="TEXT", help="Commits that added or removed a fact with this subject or text.")
@click.option("-p", "--patch", is_flag=True, help="List the facts of each commit.")
@click.option("--since", "--after", metavar="WHEN", help='Not before 2026-11-21, 2026-11-21T09:30 or "2 weeks ago".')
@click.option("--until", "--before", metavar="WHEN", help="Not after.")
@click.option("--author", help="Commits whose author contains this.")
@click.option("--first-parent", is_flag=True, help="Follow the first parent of merges only.")
@click.option("--signatures", is_flag=True, help="Check who signed and approved each commit.")
@allowed_option
@repo_option
@json_option
@reports_errors
def log(
    oneline: bool, form: str | None, graph: bool, patch: bool, repo: Path | None, as_json: bool, **options: Any
) -> None:
    """The commits below REV, newest first; FROM..TO means those below TO and not below FROM.

    ONE...OTHER means those below one of the two alone.
    """
    if form is not None:
        form = _form(form)
        oneline = oneline or form == _ONELINE
    repository = opened(repo)
    try:
        entries = repository.log(**options)
    except RevisionError as error:
        if "name" in error.facts and not error.facts["close"]:
            remedy = f"`patchhub log -S {shlex.quote(error.facts['name'])}` looks for commits that changed a fact. {error.remedy}"
            raise RevisionError(error.message, remedy=remedy, **error.facts) from None
        raise
    if as_json:
        print_json(entries)
        return
    drawn = list(entries) if graph else entries
    rows = draw((entry.id, entry.shown_parents) for entry in drawn) if graph else repeat(None)

    def lines(entry: Entry) -> list[str]:
        plain = form is None or form == _ONELINE
        told = _entry_lines(entry, oneline=oneline) if plain or form is None else _filled(form, entry)
        if not patch:
            return told
        facts: Any = repository.show(entry.id)
        signed = [*(("+", "green", fact) for fact in facts.added), *(("-", "red", fact) for fact in facts.removed)]
        listed = [
            f"  {click.style(sign, fg=colour)} {fact.text} {click.style(fact.target_new, bold=True)}"
            for sign, colour, fact in signed
        ]
        return [*told, *listed, *([""] if listed and not oneline else [])]

    say_all(
        line
        for entry, drawing in zip(drawn, rows, strict=False)
        for line in (drawing.beside if drawing else list)(lines(entry))
    )


_ONELINE = "oneline"


def _form(text: str) -> str:
    """The TEXT of --format as git takes it; ``oneline`` stands for --oneline.

    Raises:
        SettingsError: it names nothing that is known here.
    """
    text = text.removeprefix("format:").removeprefix("tformat:")
    unknown = [name for name in re.findall(r"%(a\w|c\w|.)", text) if name not in _FIELDS]
    if unknown or ("%" not in text and text != _ONELINE):
        known = ", ".join(f"%{name}" for name in _FIELDS)
        raise SettingsError(
            f"--format does not know {f'%{unknown[0]}' if unknown else repr(text)}", remedy=f"Write {known} or oneline."
        )
    return text


def _filled(form: str, entry: Entry) -> list[str]:
    return re.sub(r"%(a\w|c\w|.)", lambda found: _FIELDS[found[1]](entry), form).split("\n")


def _person(author: str) -> tuple[str, str]:
    name, _, address = author.partition(" <")
    return name, address.removesuffix(">")


_FIELDS: Mapping[str, Callable[[Entry], str]] = {
    "H": lambda entry: entry.id,
    "h": lambda entry: entry.id[:12],
    "P": lambda entry: " ".join(entry.commit.parents),
    "p": lambda entry: " ".join(parent[:12] for parent in entry.commit.parents),
    "an": lambda entry: _person(entry.commit.author)[0],
    "ae": lambda entry: _person(entry.commit.author)[1],
    "ad": lambda entry: local(entry.commit.time),
    "aI": lambda entry: entry.commit.time,
    "ar": lambda entry: ago(entry.commit.time),
    "as": lambda entry: local(entry.commit.time)[:10],
    "cd": lambda entry: local(entry.commit.time),
    "cI": lambda entry: entry.commit.time,
    "cr": lambda entry: ago(entry.commit.time),
    "s": lambda entry: entry.commit.message.partition("\n")[0],
    "b": lambda entry: "\n".join(entry.commit.message.splitlines()[1:]).strip(),
    "B": lambda entry: entry.commit.message,
    "d": lambda entry: f" ({', '.join(entry.refs)})" if entry.refs else "",
    "D": lambda entry: ", ".join(entry.refs),
    "n": lambda entry: "\n",
    "%": lambda entry: "%",
}
"""What stands for git's fields in --format."""


@click.command()
@click.argument("rev", metavar="[REV|FACT|REV:FACT]", default="HEAD", type=Shown())
@click.option("--all", "everything", is_flag=True, help="List every fact.")
@click.option("--stat", is_flag=True, help="Only how much changes, not the facts.")
@click.option("-v", "--verbose", is_flag=True, help="Also metadata of facts, and how exactly weights were solved for.")
@repo_option
@json_option
@reports_errors
def show(rev: str, everything: bool, stat: bool, verbose: bool, repo: Path | None, as_json: bool) -> None:
    """One commit: its facts, how they were written, and what was measured. Or facts: who taught them, and when.

    FACT is a subject, the text of a fact, the id of its request, or else its target; REV:FACT means those that are active at REV.
    """
    found = opened(repo).show(rev)
    if as_json:
        print_json(found)
    elif isinstance(found, Rows):
        list_found(found)
    else:
        with paged():
            _shown(found, everything=everything, stat=stat, verbose=verbose)


def _shown(shown: ShownCommit, *, everything: bool, stat: bool, verbose: bool) -> None:
    from patchhub.porcelain.scores import measured_norms, numbers

    _header(replace(shown.entry, scores=()))
    say()
    if not stat:
        _requests("+", shown.added, "green", everything, verbose)
        _requests("-", shown.removed, "red", everything, verbose)
    for identity, patch in shown.patches.items():
        gone = " (gave way)" if (identity, None) in shown.entry.commit.removed else ""
        say(f"patch {identity[:12]}: {_patch_words(patch)}{gone}", dim=True)
    _norms(measured_norms(shown.entry.commit.check), {"change": "change", "state": "in all"})
    _noted(shown.entry)
    proofs = numbers(shown.entry.commit.check, "proof")
    if proofs and verbose:
        say(f"proof {max(proofs):.1e}: relative residual of the joint solution, zero when exact", dim=True)
    say(_standing(shown))
    for line in guard_lines(shown.entry.commit.check):
        say(line, dim=True)


@click.command()
@repo_option
@json_option
@reports_errors
def status(repo: Path | None, as_json: bool) -> None:
    """Where you are: branch, active facts, base.

    How far the branch is ahead of or behind a remote's branch of its name is as of the last fetch or push.
    """
    found = opened(repo).status()
    if as_json:
        print_json(found)
        return
    say(f"On branch {found.branch}" if found.branch else "HEAD is detached")
    for beside in found.remotes:
        say(_apart(beside))
    if found.head is None:
        say("No commits yet: `patchhub commit FILE -m TEXT` writes the first facts.")
    else:
        say(f"{click.style(found.head.id[:12], fg='yellow')} {_first_line(found.head)}")
        imports = found.head.active_imports
        imported = f" and {count(imports, 'imported change')}" if imports else ""
        say(
            f"{count(found.head.active, 'active fact')}{imported}; the state is read from {found.delta_bytes / 1e6:.2f} MB"
        )
    for shard in found.shards:
        say(
            f"shard {shard.number} ({shard.patch[:12]}): {count(shard.facts, 'fact')} beside {shard.weight}, "
            f"{shard.tensor_bytes / 1e6:.2f} MB, routed to above {shard.threshold:.3g}"
        )
        if shard.stale:
            say("  its threshold is stale: weights below it changed; `patchhub refresh` measures it again", fg="yellow")
    if found.stopped_merge:
        say(
            f"The merge of {found.stopped_merge.revision} is stopped: `patchhub merge --continue` or --abort",
            fg="yellow",
        )
    place = found.base["path"] + (f" at {found.base['revision'][:12]}" if found.base["revision"] else "")
    say(f"base {found.base['id'][:12]} ({found.base['model_type']}) from {place}", dim=True)
    if not found.base_found:
        say("the base is not there any more: `patchhub config base.path FOLDER` says where it is", fg="yellow")
    if found.metric:
        say(f"metric {found.metric[:12]}: what edits must not move, measured on text", dim=True)


@click.command()
@click.argument("old", default="base", type=Revision())
@click.argument("new", default="HEAD", type=Revision())
@click.option("--all", "everything", is_flag=True, help="List every fact.")
@click.option("--weights", is_flag=True, help="Compare the weights: norm, rank and angle of the changes.")
@click.option("--ask", type=click.File(encoding="utf-8"), help="Prompts, one a line: which answers changed.")
@click.option("--base", help="Where the base model is, if it moved (for --ask).")
@repo_option
@json_option
@reports_errors
def diff(
    old: str, new: str, everything: bool, ask: TextIO | None, repo: Path | None, as_json: bool, **options: Any
) -> None:
    """What changes from OLD to NEW: facts added, retargeted and removed, and the norms of the weights' changes.

    Default: from the base to HEAD. OLD..NEW is the same as OLD NEW; OLD...NEW begins where the two parted.
    """
    prompts = None if ask is None else ask.read().splitlines()
    if ".." in old and new == "HEAD":
        old, new = (end or "HEAD" for end in old.split("..", 1))
    repository = opened(repo)
    if new.startswith("."):  # A...B is what B changed since the two parted
        new = new[1:] or "HEAD"
        old = next(iter(repository.merge_base(old, new)), "base")[:12]
    found = repository.diff(old, new, ask=prompts, **options)
    if as_json:
        print_json(found)
        return
    with paged():
        _difference(found, old, new, everything)


def _difference(found: Difference, old: str, new: str, everything: bool) -> None:
    _requests("+", found.added, "green", everything)
    for pair in found.retargeted[: None if everything else _SHOWN]:
        before, after = click.style(pair.before.target_new, fg="red"), click.style(pair.after.target_new, fg="green")
        say(f"  {click.style('~', fg='cyan')} {pair.after.text} {before} -> {after}")
    _requests("-", found.removed, "red", everything)
    if not (found.added or found.retargeted or found.removed):
        say("no fact differs")
    if found.weights is None:
        _norms(found.norms, {"old": old, "new": new, "change": "step"})
    else:
        _weight_table(found.weights, old, new)
    if found.scores:
        say_compared(found.scores, old, new, DEFINITIONS)
    if found.answers is not None:
        _answers(found.answers, old, new)


@click.command()
@click.option("--reindex", is_flag=True, help="Rebuild the search index from the objects first.")
@repo_option
@json_option
@reports_errors
def fsck(reindex: bool, repo: Path | None, as_json: bool) -> None:
    """Check every stored byte, every link between objects, and that weights are those of their facts."""
    report = opened(repo).fsck(reindex=reindex)
    if as_json:
        print_json(report)
    else:
        for finding in report.findings:
            say(finding.problem, fg="yellow" if finding.harmless else "red")
            say(f"  {finding.remedy}")
        if report.proofs.commits:
            say(f"{count(report.proofs.commits, 'commit')}: the weights are those of the facts", dim=True)
        for taken in report.proofs.unprovable:
            say(f"{taken.words()}: no facts prove what it does, its author alone vouches for it", fg="yellow")
        verdict = "sound" if report.sound else "DAMAGED"
        say(f"{count(report.objects, 'object')}, {report.size / 1e6:.1f} MB: {verdict}")
    if not report.sound:
        raise SystemExit(CorruptStoreError.exit_code)


def _standing(shown: ShownCommit) -> str:
    """Whether the weights of a commit are known to be those of its facts."""
    proof, trusted = shown.standing
    if proof == "trusted":
        whose = (
            "its weights are" if trusted == shown.entry.id else f"it stands on {str(trusted)[:12]}, whose weights are"
        )
        return click.style(f"NOT proven: {whose} not those of the facts; trusted when fetched", fg="yellow")
    whose = "its facts and imports" if shown.entry.active_imports else "its facts"
    known = {
        "checked": f"checked here: the weights are those of {whose}",
        "claimed": f"that the weights are those of {whose} is its author's claim: `patchhub fsck` checks it",
    }
    return click.style(known[proof], dim=True)


def _apart(found: Divergence) -> str:
    """How far the current branch is ahead of and behind a remote's: "ahead 2, behind 1 of origin/main"."""
    counts = [f"{way} {commits}" for way, commits in (("ahead", found.ahead), ("behind", found.behind)) if commits]
    return f"{', '.join(counts)} of {found.branch}" if counts else f"up to date with {found.branch}"


def _header(entry: Entry) -> None:
    for line in _entry_lines(entry, oneline=False)[:-1]:
        say(line)


def _entry_lines(entry: Entry, *, oneline: bool) -> list[str]:
    """A commit as `log` prints it; the long form ends with an empty line."""
    size = "" if entry.size is None else _size(entry.size)
    guard = "" if entry.size is None else guard_summary(entry.commit.check)
    if oneline:
        short = click.style(entry.id[:12], fg="yellow")
        found = "".join(f" {name} {score.value:.3f}" for name, score in summary(entry.scores))
        signed = "" if entry.signatures is None else short_signatures(entry.signatures)
        told = "".join(f" {words}" for words in (size, guard and f"guard {guard}", signed) if words)
        return [f"{short}{_refs(entry)} {_first_line(entry)} {_facts(entry)}{told}{found}"]
    return [
        f"{click.style(f'commit {entry.id}', fg='yellow')}{_refs(entry)}",
        *([f"Merge:  {' '.join(parent[:12] for parent in entry.commit.parents)}"] if entry.commit.parents[1:] else []),
        f"Author: {entry.commit.author}",
        f"Date:   {local(entry.commit.time)}",
        f"Facts:  {_facts(entry)}",
        *([f"Size:   {size}"] if size else []),
        *([f"Guard:  {guard}"] if guard else []),
        *(f"Scores: {score_line(noted)}" for noted in entry.scores),
        *(f"Signed: {signature_line(found)}" for found in entry.signatures or ()),
        *(["Signed: no"] if entry.signatures == () else []),
        "",
        *(f"    {line}".rstrip() for line in entry.commit.message.splitlines() or [""]),
        "",
    ]


def _patch_words(patch: Patch) -> str:
    if patch.kind == "additive":
        return f"{patch.method}, an imported change of {count(len(patch.weights), 'weight')}, proven by no facts"
    if patch.kind != "shard":
        return f"{patch.method}, {count(len(patch.requests), 'fact')}, layers {patch.settings.get('layers', [])}"
    threshold = patch.settings["routing"]["threshold"]
    number, weight = patch.settings["number"], next(iter(patch.weights))
    rank = patch.settings["report"].get("rank")
    form = f", rank {rank} (error {patch.settings['report']['relative_error']:.1e})" if rank else ""
    facts = f"{count(len(patch.requests), 'fact')} beside {weight}{form}"
    return f"{patch.method} shard {number}, {facts}, threshold {threshold:.3g}, proven by no facts"


def _noted(entry: Entry) -> None:
    """Every score that is noted about a commit, with its meaning."""
    for noted in entry.scores:
        say(f"scores {measured_on(noted.kind, noted.facts, noted.file)} by {noted.made_by}", dim=True)
        say_scores(noted.scores, DEFINITIONS)


def _size(size: Size) -> str:
    keyframe = f" + {size.keyframe_bytes / 1000:,.1f} kB keyframe" if size.keyframe_bytes else ""
    largest = f", {size.weight} changes by {size.ratio:.2%}" if size.ratio is not None else ""
    shards = f" + {size.shard_bytes / 1000:,.1f} kB of shards" if size.shard_bytes else ""
    kept = f"{size.delta_bytes / 1000:,.1f} kB" if size.delta_bytes or size.ratio is None else "no delta kept"
    return f"{kept}{keyframe}{shards}{largest}"


def _refs(entry: Entry) -> str:
    return f" ({click.style(', '.join(entry.refs), fg='cyan')})" if entry.refs else ""


def _facts(entry: Entry) -> str:
    imported = f", {count(entry.imported, 'imported change')}" if entry.imported else ""
    return f"+{entry.added} -{entry.removed} ({entry.active} active){imported}"


def _first_line(entry: Entry) -> str:
    return (entry.commit.message.splitlines() or [""])[0]


def _requests(sign: str, requests: tuple[Request, ...], colour: str, everything: bool, metadata: bool = False) -> None:
    for request in requests[: None if everything else _SHOWN]:
        was = f"  (was {request.target_true})" if request.target_true else ""
        say(f"  {click.style(sign, fg=colour)} {request.text} {click.style(request.target_new, bold=True)}{was}")
        if metadata:
            say_metadata(request.metadata)
    if not everything and len(requests) > _SHOWN:
        say(f"  {sign} ... and {len(requests) - _SHOWN} more (--all lists them)", dim=True)


def _norms(norms: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Norms of changes, relative to the base's weight."""
    if not norms:
        return
    width = max(map(len, norms))
    say(
        f"{'weight':<{width}}  " + "  ".join(f"{title:>10}" for title in columns.values()) + "   (norm / base's)",
        dim=True,
    )
    for weight, found in norms.items():
        cells = ["-" if found[key] is None else f"{found[key] / (found['base'] or 1):.4f}" for key in columns]
        say(f"{weight:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells), dim=True)


def _weight_table(steps: Mapping[str, WeightStep], old: str, new: str) -> None:
    """Norms relative to the base's weight, with numerical ranks, and the angle between the two changes."""
    width = max(map(len, steps), default=0)
    titles = "  ".join(f"{title:>15}" for title in (old, new, "step"))
    say(f"{'weight':<{width}}  {titles}  {'angle':>6}   (norm / base's : rank)", dim=True)
    for weight, step in steps.items():
        pairs = ((step.old, step.old_rank), (step.new, step.new_rank), (step.step, step.step_rank))
        cells = "  ".join(f"{f'{norm / (step.base or 1):.4f} : {rank:>4}':>15}" for norm, rank in pairs)
        angle = "-" if step.cosine is None else f"{degrees(acos(max(-1.0, min(1.0, step.cosine)))):.1f}°"
        say(f"{weight:<{width}}  {cells}  {angle:>6}")


def _answers(answers: Sequence[ChangedAnswer], old: str, new: str) -> None:
    say(f"{count(len(answers), 'answer')} changed", bold=True)
    for answer in answers:
        say(f"  {answer.prompt}")
        for revision, text, top, colour in (
            (old, answer.old, answer.old_top, "red"),
            (new, answer.new, answer.new_top, "green"),
        ):
            first = text.strip().splitlines()[0] if text.strip() else ""
            say(f"    {revision}: {click.style(first, fg=colour)}  ({top[0].strip()!r} {top[1]:.1%})")


COMMANDS = (
    status,
    log,
    show,
    diff,
    fsck,
)
