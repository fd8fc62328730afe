"""Commands that measure: eval, bench; and scores in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import chat_option, placement_options, say_faults
from patchhub.cli.terminal import (
    author_of,
    bars,
    count,
    json_option,
    now,
    open_repository,
    print_json,
    repo_option,
    reports_errors,
    say,
    stamp,
    talk,
)
from patchhub.errors import SettingsError
from patchhub.who import Who

if TYPE_CHECKING:
    from patchhub.porcelain.measure import Bench, Evaluation, HistoryRow
    from patchhub.porcelain.scores import Compared, Noted, Score


_SMALL = ("kl",)
_CHANGE = 0.0005  # what three digits show


def score_line(noted: Noted) -> str:
    """`S 0.883  ES 0.950 ... (counterfact, 100 facts of facts.json)`."""
    numbers = "  ".join(f"{name} {number(name, score.value)}" for name, score in noted.leading.items())
    return f"{numbers}  {click.style(measured_on(noted.kind, noted.facts, noted.file), dim=True)}"


def summary(notes: Sequence[Noted]) -> list[tuple[str, Score]]:
    """The first score of each note, for where a line is short: `S`, or `chat S` where it was asked in a chat."""
    leading = [(noted.chat, *next(iter(noted.leading.items()))) for noted in notes if noted.leading]
    return [(f"chat {name}" if chat else name, score) for chat, name, score in leading]


def measured_on(kind: str, facts: int, file: str) -> str:
    """`(counterfact, 100 facts of facts.json)`."""
    number_of = f", {count(facts, 'fact')}" if facts else ""
    return f"({kind}{number_of}{f' of {file}' if file else ''})"


def number(name: str, value: float) -> str:
    """Three decimals; small numbers, such as KL, in two digits."""
    return f"{value:.2g}" if name in _SMALL else f"{value:.3f}"


def say_scores(scores: Mapping[str, Score], definitions: Mapping[str, str], *, against: str = "base") -> None:
    """One line per score: value, interval, the value it is compared with, and what it means."""
    for name, score in scores.items():
        low, high = (None if bound is None else number(name, bound) for bound in (score.low, score.high))
        interval = f"[{low}, {high}]" if low and high else ""
        beside = f"{against} {number(name, score.base)}" if score.base is not None else ""
        say(
            f"{name:>20} {number(name, score.value):>7} {click.style(f'{interval:<16} {beside:<13}', dim=True)} "
            f"{definitions.get(name, '')}"
        )


def say_compared(rows: Sequence[Compared], old: str, new: str, definitions: Mapping[str, str]) -> None:
    """Per suite the scores at two revisions beside each other and their difference."""
    for row in rows:
        say(f"scores {measured_on(row.kind, row.facts, row.file)}", dim=True)
        width = max(8, len(old[:12]), len(new[:12]))
        say(f"{'':>20} {old[:12]:>{width}} {new[:12]:>{width}} {'change':>8}", dim=True)
        for name in {**row.after, **row.before}:
            before, after = row.before.get(name), row.after.get(name)
            cells = ["-" if side is None else number(name, side.value) for side in (before, after)]
            change = after.value - before.value if before and after else None
            shown = "-" if change is None else f"{change:+.3f}" if abs(change) >= _CHANGE else "="
            say(
                f"{name:>20} {cells[0]:>{width}} {cells[1]:>{width}} {shown:>8}  "
                f"{click.style(definitions.get(name, ''), dim=True)}"
            )


def say_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table under its titles: the first column to the left, the others to the right."""
    table = [list(titles), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    for place, row in enumerate(table):
        first, *others = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join([first, *others]).rstrip(), bold=place == 0)


_RELATIONS = 8
_FEWEST = 3
_METRICS = ("auto", "counterfact", "zsre", "wise")
_file = click.Path(path_type=Path, dir_okay=False)


@click.command("eval")
@click.argument("rev", default="HEAD")
@click.option("--suite", "file", required=True, type=_file, help="Facts to evaluate on: any file that `commit` reads.")
@click.option(
    "--metrics",
    type=click.Choice(_METRICS),
    default="auto",
    show_default=True,
    help="Whose scores; auto: zsRE's for a file of its records, else CounterFact's.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="At most so many facts: the first ones, or with --seed a sample."
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the sample, of sampled text and of the intervals.")
@click.option("--text", multiple=True, type=_file, help="Text to measure drift on. Default: what was kept aside.")
@click.option("--context", "contexts", multiple=True, help="Text around the prompt in live decoding, with one {}.")
@click.option("--all", "everything", is_flag=True, help="Every commit below REV that has no such scores yet.")
@click.option("--csv", "csv_file", type=_file, help="Also write the scores as CSV.")
@click.option("--facts-csv", "facts_file", type=_file, help="Also write each fact's own values as CSV.")
@click.option("--plot", type=_file, help="Also draw the scores as SVG: by commit, generality/specificity, by relation.")
@click.option("--no-note", is_flag=True, help="Do not keep the scores with the commit.")
@click.option("--author", help="Who measures.")
@placement_options
@chat_option
@repo_option
@json_option
@reports_errors
def evaluate(
    rev: str,
    file: Path,
    metrics: str,
    limit: int | None,
    seed: int | None,
    text: tuple[Path, ...],
    contexts: tuple[str, ...],
    everything: bool,
    csv_file: Path | None,
    facts_file: Path | None,
    plot: Path | None,
    no_note: bool,
    author: str | None,
    device: str | None,
    dtype: str | None,
    quantization: str | None,
    chat: bool | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """How well REV holds the facts in --suite FILE, and what that costs elsewhere.

    Teacher-forced scores beside live decoding, fluency and drift, each with its definition, a 95 % bootstrap interval over facts and
    the unpatched model's number. They are kept as a note of the commit, which log, show, diff and push know. With --chat all prompts
    are messages of the base's chat template; fluency and drift stay outside it. docs/evaluation.md has the definitions in full.
    """
    from patchhub.editing.requests import read_requests
    from patchhub.porcelain.measure import Facts, metrics_for
    from patchhub.porcelain.measure import evaluate as run
    from patchhub.porcelain.measure import evaluate_history as walk
    from patchhub.porcelain.report.charts import facts_csv, scores_csv
    from patchhub.porcelain.report.charts import score_picture as picture
    from patchhub.porcelain.scores import noted_history
    from patchhub.worktree.opening import placement_of

    if everything and no_note:
        raise SettingsError(
            "--all and --no-note contradict each other", remedy="A walk keeps what it measures; leave one out."
        )
    repository = open_repository(repo)
    chosen = metrics_for(file) if metrics == "auto" else metrics
    facts = Facts(read_requests(file).requests, file.name, chosen, limit, seed, text)
    facts = replace(facts, contexts=contexts) if contexts else facts
    placement = placement_of(repository, device=device, dtype=dtype, quantization=quantization)
    who, rows = stamp(repository, author), None
    with bars() as progress:
        if everything:
            rows = walk(repository, rev, facts, progress, who=who, placement=placement, chat=chat)
            rev = next((row.commit for row in rows if row.noted), "base")  # the newest that gives numbers
        keep = not (no_note or everything)
        done = run(repository, rev, facts, progress, who=who, keep=keep, placement=placement, chat=chat)
    if csv_file:
        noted = [(row.commit, done.suite, row.noted.scores) for row in rows or () if row.noted]
        _write(csv_file, scores_csv([(done.commit, done.suite, done.scores)] if rows is None else noted))
    if facts_file:
        _write(facts_file, facts_csv(done))
    if plot:
        _write(plot, picture(done, noted_history(repository, rev, done.suite)))
    if as_json:
        print_json(done.to_json() if rows is None else [row.to_json() for row in rows])
    elif rows is None:
        _evaluation(done)
    else:
        _history(rows, done)


@click.command()
@click.argument("methods", metavar="METHOD...", nargs=-1, required=True)
@click.option("--suite", "file", required=True, type=_file, help="Facts to write and to evaluate on.")
@click.option("--metrics", type=click.Choice(_METRICS), default="auto", show_default=True, help="Whose scores.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many facts: the first, or with --seed a sample.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the sample, of sampled text and of the intervals.")
@click.option("--text", multiple=True, type=_file, help="Text to measure drift on. Default: what was kept aside.")
@click.option("--batch", type=click.IntRange(min=1), help="Commit so many facts at a time. Default: all at once.")
@click.option("--base", help="A model folder or Hub id instead of this repository's base and settings.")
@click.option("--csv", "csv_file", type=_file, help="Also write the table as CSV.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--author", help="Who measures.")
@chat_option
@repo_option
@json_option
@reports_errors
def bench(
    methods: tuple[str, ...],
    file: Path,
    metrics: str,
    limit: int | None,
    seed: int | None,
    text: tuple[Path, ...],
    batch: int | None,
    base: str | None,
    csv_file: Path | None,
    markdown: bool,
    author: str | None,
    chat: bool | None,
    repo: Path | None,
    as_json: bool,
) -> None:
    """Compare editors on one list of facts, each alone on the base, in a temporary repository.

    \b
      patchhub bench memit pmet --suite facts.json --limit 100
      patchhub bench memit memit:ridge=400 memit:layers=3-5:steps=30 --suite facts.json

    Scores are those of `eval`; times and sizes are per fact.
    """
    from contextlib import nullcontext

    from patchhub.sets.settings import contender

    contenders = [contender(method) for method in methods]

    from patchhub.editing.requests import read_requests
    from patchhub.porcelain.measure import Facts, bench_csv, metrics_for, scratch_repository
    from patchhub.porcelain.measure import bench as run

    chosen = metrics_for(file) if metrics == "auto" else metrics
    facts = Facts(read_requests(file).requests, file.name, chosen, limit, seed, text)
    with bars() as progress:
        who = Who(author_of({}, author), now())
        place = scratch_repository(base, progress, who=who) if base else nullcontext(open_repository(repo))
        with place as repository:
            found = run(repository, contenders, facts, progress, who=who, batch=batch, chat=chat)
    if csv_file:
        _write(csv_file, bench_csv(found))
    if as_json:
        print_json(found.to_json())
    else:
        _bench(found, markdown)


def _write(file: Path, text: str) -> None:
    from patchhub.fsio import write_atomically

    write_atomically(file, (text.encode("utf-8"),))
    talk(f"wrote {file}")


def _evaluation(done: Evaluation) -> None:
    from patchhub.evaluation.definitions import DEFINITIONS, GROUPS

    where = f"commit {done.commit[:12]}" if done.commit else "the unpatched base"
    say(f"{count(len(done.facts), 'fact')} of {done.settings['file']} at {where}{_asked(done.settings)}", bold=True)
    _figures(done)
    if done.faults:
        say("What does not read right" + (", of answers in a chat" if done.chat else ""), fg="cyan")
        say_faults(done.faults)
    say("score, 95 % interval over records, the unpatched base's score, definition", dim=True)
    for group in done.groups:
        say(GROUPS[group.suite], fg="cyan")
        say_scores({name: score for name, score in done.scores.items() if name in group.estimates}, DEFINITIONS)
    _relations(done)
    if done.note:
        say(f"kept as note {done.note[:12]}", dim=True)


_FIGURES = {
    "live_efficacy": "live efficacy",
    "live_paraphrase": "paraphrase",
    "closure": "closure",
    "leak": "leak",
    "perplexity_ratio": "perplexity",
    "kl": "KL",
}
"""The titles of what comes first; with the teacher-forced summary they fit into 80 columns."""


def _figures(done: Evaluation) -> None:
    """Six figures of a revision above those of the base: what is said, what leaks, how far text drifts, and the teacher-forced score."""
    from patchhub.evaluation.definitions import FIGURES, LEADING

    summary = LEADING[done.settings["metrics"]][0]
    names = [name for name in (*FIGURES, summary) if name in done.scores]
    rows = [["", *(number(name, done.scores[name].value) for name in names)]]
    if done.commit:
        rows.append(["base", *(number(name, done.base[name]) if name in done.base else "-" for name in names)])
    say_table(["", *(_FIGURES.get(name, name) for name in names)], rows)


def _asked(settings: Mapping[str, Any]) -> str:
    """How the facts were asked, where it is not as they stand."""
    return ", asked in the base's chat form" if "chat" in settings else ""


def _relations(done: Evaluation) -> None:
    """The most frequent prompt templates with the leading scores; those of one or two facts say nothing."""
    from patchhub.evaluation.definitions import LEADING

    frequent = [(template, found) for template, found in done.relations.items() if found["facts"] >= _FEWEST]
    names = [name for name in (*LEADING[done.settings["metrics"]], "exact") if name in done.scores]
    rows = [
        [
            template[:50],
            f"{found['facts']:.0f}",
            *(number(name, found[name]) if name in found else "-" for name in names),
        ]
        for template, found in frequent[:_RELATIONS]
    ]
    if rows:
        say("By relation: the facts of one prompt (--json and --plot have more)", fg="cyan")
        say_table(["", "facts", *names], rows)


def _history(rows: Sequence[HistoryRow], done: Evaluation) -> None:
    """A line per commit, newest first, above the definitions of what it shows."""
    from patchhub.evaluation.definitions import DEFINITIONS, headline

    if not rows:
        say("there is no commit yet")
        return
    names = [name for name in headline(done.settings["metrics"]) if name in done.scores]
    table = []
    for row in rows:
        scores = row.noted.scores if row.noted else {}
        cells = [number(name, scores[name].value) if name in scores else "-" for name in names]
        title = (row.message.splitlines() or [""])[0][:40]
        table.append([f"{row.commit[:12]} {title}", *cells, "now" if row.fresh else "noted"])
    base = [number(name, done.base[name]) if name in done.base else "-" for name in names]
    about = f"{done.settings['file']}, {done.settings['metrics']}{_asked(done.settings)}"
    say(f"{count(len(done.facts), 'fact')} of {about}", bold=True)
    say_table(["commit", *names, "measured"], [*table, ["the unpatched base", *base, ""]])
    for name in names:
        say(f"{name:>20} {DEFINITIONS[name]}", dim=True)


def _bench(found: Bench, markdown: bool) -> None:
    """The table, then what its columns mean and why editors failed."""
    from patchhub.porcelain.measure import row_values

    table = []
    for row in found.rows:
        values = zip(found.titles, row_values(found, row), strict=True)
        table.append([row.name, *("-" if value is None else number(title, value) for title, value in values)])
    titles = ["editor", *found.titles]
    if markdown:
        say(f"| {' | '.join(titles)} |")
        say("|---|" + "---:|" * len(found.titles))
        for cells in table:
            say(f"| {' | '.join(cells)} |")
    else:
        facts = found.settings.get("facts")
        about = f"{found.settings['file']}{_asked(found.settings)}"
        say(f"{count(facts, 'fact') if facts else 'facts'} of {about}", bold=True)
        say_table(titles, table)
        for title, meaning in found.definitions.items():
            say(f"{title:>20} {meaning}", dim=True)
    for row in found.rows:
        if row.failure:
            say(f"{row.name}: {row.failure}", fg="red")


COMMANDS = (
    evaluate,
    bench,
)
