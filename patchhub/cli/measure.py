"""Commands that measure, and that fit the editors to a base: eval, bench, metric, tune; and scores in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.options import (
    FactsFile,
    Revision,
    chat_option,
    format_option,
    limit_option,
    memory_option,
    metrics_option,
    placement_options,
    say_faults,
    seed_option,
    text_option,
    workers_options,
)
from patchhub.cli.terminal import (
    Group,
    author_option,
    bars,
    count,
    json_option,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
    talk,
)

if TYPE_CHECKING:
    from patchhub.porcelain.measure import Bench, Evaluation, HistoryRow
    from patchhub.porcelain.metric import Shown
    from patchhub.porcelain.scores import Compared, Noted, Score
    from patchhub.porcelain.tune import Trial, Tuned
    from patchhub.repository import Repository


_SMALL = ("kl",)
_MEANING = 61  # where a score's meaning begins beside its numbers
_BELOW = 21  # and where below them, where the terminal is narrow
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
        numbers = f"{name:>20} {number(name, score.value):>7} {click.style(f'{interval:<16} {beside:<13}', dim=True)}"
        meaning, room = definitions.get(name, ""), get_terminal_size().columns - _MEANING
        if len(meaning) <= room:
            say(f"{numbers} {meaning}")
        else:
            say(numbers)
            for line in wrap(meaning, width=max(room + _MEANING - _BELOW, 20)):
                say(f"{'':{_BELOW}}{line}", dim=True)


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
_file = click.Path(path_type=Path, dir_okay=False)


@click.command("eval")
@click.argument("rev", default="HEAD", type=Revision())
@click.option("--suite", type=FactsFile(), help="Facts to evaluate on: any file that `commit` reads.")
@metrics_option
@limit_option
@seed_option
@click.option("--text", multiple=True, type=_file, help="Text to measure drift on. Default: what was kept aside.")
@click.option("--context", multiple=True, help="Text around the prompt in live decoding, with one {}.")
@click.option("--all", is_flag=True, help="Every commit below REV that has no such scores yet.")
@click.option("--csv", type=_file, help="Also write the scores as CSV.")
@click.option("--facts-csv", type=_file, help="Also write each fact's own values as CSV.")
@click.option("--plot", type=_file, help="Also draw the scores as SVG: by commit, generality/specificity, by relation.")
@click.option("--note/--no-note", default=True, help="Keep the scores with the commit (default), or do not.")
@click.option(
    "--judge", metavar="URL", help="An OpenAI-compatible server whose model says whether answers give their targets."
)
@click.option("--judge-model", metavar="NAME", help="The judge's name there. Default: the first that the server names.")
@click.option("--harness", metavar="TASKS", help="Also run tasks of lm-evaluation-harness, separated by commas.")
@click.option("--harness-path", type=click.Path(path_type=Path, file_okay=False), help="A folder with further tasks.")
@click.option("--harness-limit", type=click.IntRange(min=1), help="At most so many documents of each task.")
@author_option
@placement_options
@chat_option
@workers_options
@repo_option
@json_option
@reports_errors
def evaluate(repo: Path | None, as_json: bool, **options: Any) -> None:
    """How well REV holds the facts in --suite FILE, and what that costs elsewhere.

    Teacher-forced scores beside live decoding, fluency and drift, each with its definition, a 95 % bootstrap interval over facts and
    the unpatched model's number. They are kept as a note of the commit, which log, show, diff and push know. With --chat all prompts
    are messages of the base's chat template; fluency and drift stay outside it. --harness TASKS needs no --suite. The judge's key is
    PATCHHUB_JUDGE_KEY or OPENAI_API_KEY of the environment. docs/evaluation.md has the definitions in full.
    """
    done = opened(repo).eval(**options)
    for file in (options[name] for name in ("csv", "facts_csv", "plot") if options[name]):
        talk(f"wrote {file}")
    if as_json:
        print_json(done if done.history is None else done.history)
    elif done.history is not None:
        _history(done.history, done)
    else:
        _evaluation(done)


@click.command()
@click.argument("methods", metavar="METHOD...", nargs=-1, required=True)
@click.option("--suite", required=True, type=FactsFile(), help="Facts to write and to evaluate on.")
@metrics_option
@limit_option
@seed_option
@click.option("--text", multiple=True, type=_file, help="Text to measure drift on. Default: what was kept aside.")
@click.option("--batch", type=click.IntRange(min=1), help="Commit so many facts at a time. Default: all at once.")
@click.option("--base", help="A model folder or Hub id instead of this repository's base and settings.")
@click.option("--csv", type=_file, help="Also write the table as CSV.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@author_option
@chat_option
@repo_option
@json_option
@reports_errors
def bench(
    methods: tuple[str, ...], base: str | None, markdown: bool, repo: Path | None, as_json: bool, **options: Any
) -> None:
    """Compare editors on one list of facts, each alone on the base, in a temporary repository.

    \b
      patchhub bench memit pmet --suite facts.json --limit 100
      patchhub bench memit memit:ridge=400 memit:layers=3-5 --suite facts.json

    Scores are those of `eval`; times and sizes are per fact.
    """
    from patchhub.sets.settings import contender

    for method in methods:
        contender(method)  # before a base is read for it
    with _about(base, repo) as repository:
        found = repository.bench(*methods, **options)
    if options["csv"]:
        talk(f"wrote {options['csv']}")
    if as_json:
        print_json(found)
    else:
        _bench(found, markdown)


@contextmanager
def _about(base: str | None, repo: Path | None) -> Iterator[Repository]:
    """The repository; or one about a base alone, which is gone afterwards."""
    if base is None:
        yield opened(repo)
        return
    from patchhub.repository import Repository

    with TemporaryDirectory(prefix="patchhub-bench-") as folder, Repository.init(folder, base, progress=bars()) as made:
        yield made


def _evaluation(done: Evaluation) -> None:
    from patchhub.porcelain.scores import DEFINITIONS, GROUPS

    where = f"commit {done.commit[:12]}" if done.commit else "the unpatched base"
    if not done.facts:
        say(f"lm-evaluation-harness at {where}", bold=True)
        _harness(done)
        return
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
    if done.harness:
        say("lm-evaluation-harness", fg="cyan")
        _harness(done)
    if done.note:
        say(f"kept as note {done.note[:12]}", dim=True)


def _harness(done: Evaluation) -> None:
    """The harness's own numbers of the revision and the base, each with its standard error, and what changed."""
    rows = [
        [
            row.task,
            row.metric,
            _with_error(row.base, row.base_error),
            _with_error(row.value, row.error),
            f"{row.change:+.3f}" if abs(row.change) >= _CHANGE else "=",
        ]
        for row in done.harness
    ]
    now = done.commit[:12] if done.commit else "now"
    say_table(["task", "metric", "base ± s.e.", f"{now} ± s.e.", "change"], rows)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


_FIGURES = {
    "live_efficacy": "live efficacy",
    "live_paraphrase": "paraphrase",
    "closure": "closure",
    "judged": "judged",
    "leak": "leak",
    "perplexity_ratio": "perplexity",
    "kl": "KL",
}
"""The titles of what comes first; with the teacher-forced summary they fit into 80 columns."""


def _figures(done: Evaluation) -> None:
    """Six figures of a revision above those of the base: what is said, what leaks, how far text drifts, and the teacher-forced score."""
    from patchhub.porcelain.scores import FIGURES, LEADING

    summary = LEADING[done.settings["metrics"]][0]
    names = [name for name in (*FIGURES, summary) if name in done.scores]
    rows = [["", *(number(name, done.scores[name].value) for name in names)]]
    if done.commit:
        rows.append(["base", *(number(name, done.base[name]) if name in done.base else "-" for name in names)])
    titles = {
        **_FIGURES,
        **({"perplexity_ratio": "ppl"} if "judged" in names else {}),
    }  # eight columns in 80 characters
    say_table(["", *(titles.get(name, name) for name in names)], rows)


def _asked(settings: Mapping[str, Any]) -> str:
    """How the facts were asked, where it is not as they stand."""
    return ", asked in the base's chat form" if "chat" in settings else ""


def _relations(done: Evaluation) -> None:
    """The most frequent prompt templates with the leading scores; those of one or two facts say nothing."""
    from patchhub.porcelain.scores import LEADING

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
    from patchhub.porcelain.scores import DEFINITIONS, headline

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
        for title in found.titles:
            say(f"{title:>20} {found.definitions[title]}", dim=True)
    for row in found.rows:
        if row.failure:
            say(f"{row.name}: {row.failure}", fg="red")


_SHOWN = 8


def _read_layers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """``3,4,5`` or ``3-5``, as in the config; nothing where the option is not given."""
    from patchhub.settings import read_layers

    try:
        return tuple(read_layers(value)) if value else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}", ctx, param) from None


@click.group(cls=Group, invoke_without_command=True)
@repo_option
@json_option
@click.pass_context
@reports_errors
def metric(ctx: click.Context, repo: Path | None, as_json: bool) -> None:
    """Show the metric: what the weights are asked to keep while facts are written."""
    if ctx.invoked_subcommand is None:
        _report(opened(repo).metric(), as_json)


@metric.command("compute")
@click.option("--layers", callback=_read_layers, help="For which layers: 3,4,5 or 3-5. Default: the edited ones.")
@click.option("--text", multiple=True, type=click.Path(path_type=Path), help="Text to compute it from.")
@placement_options
@memory_option("What sums and factors may take")
@workers_options
@repo_option
@json_option
@reports_errors
def metric_compute(repo: Path | None, as_json: bool, **options: Any) -> None:
    """Compute the metric now, from text that the base writes or from --text; else the first commit does.

    Until facts are recorded with it, --text and the settings metric.* make another one in its place.
    """
    _report(opened(repo).metric_compute(**options), as_json)


@metric.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="FILE...")
@repo_option
@json_option
@reports_errors
def metric_import(sources: tuple[str, ...], repo: Path | None, as_json: bool) -> None:
    """Take the metric from a file that `metric export` wrote, or from second moments of the published editors.

    Those are .npz files of rome, memit, PMET, AlphaEdit or EasyEdit, one per layer and named after it, or a folder of
    them; LAYER=FILE names the layer of any other file. The kind and its numbers are the settings metric.*; the published
    editors add no ridge (metric.epsilon 0).
    """
    _report(opened(repo).metric_import(*sources), as_json)


@metric.command("export")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@repo_option
@json_option
@reports_errors
def metric_export(file: Path, overwrite: bool, repo: Path | None, as_json: bool) -> None:
    """Write the metric to FILE, to be imported where facts about the same base are recorded."""
    digest = opened(repo).metric_export(file, overwrite=overwrite)
    if as_json:
        print_json({"out": str(file), "sha256": digest})
    else:
        say(f"Wrote {file} ({file.stat().st_size / 1e6:,.1f} MB, sha256 {digest[:12]}...)")


def _report(shown: Shown, as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    numbers = ", ".join(f"{name} {value:g}" for name, value in sorted(shown.settings.items()))
    if shown.id is None:
        say(f"No metric yet; the first commit or `patchhub metric compute` makes one: {shown.kind} ({numbers})")
        return
    say(f"metric {shown.id[:12]}: {shown.kind} ({numbers})")
    say(f"  from {_origin(shown)}, {shown.tokens:,} tokens; facts are read in {count(shown.contexts, 'context')}")
    for weight, size in shown.weights.items():
        protected = f", {shown.protected[weight]:,} directions protected" if weight in shown.protected else ""
        say(f"  {weight}  {size / 1e6:,.1f} MB{protected}")
    if not shown.weights:
        say("  the cache has nothing of it; it is computed again when it is needed", dim=True)
    if not shown.used:
        say("  no fact is recorded with it yet, so it can still be replaced", dim=True)


def _origin(shown: Shown) -> str:
    source = shown.source or {}
    if source.get("kind") == "sampled":
        return f"text that the base wrote (seed {source.get('seed', 0)})"
    if source.get("kind") == "imported":
        return "second moments that were computed elsewhere"
    return f"the text of {', '.join(source.get('names', ['a file']))}"


@click.command()
@click.argument("facts", metavar="FILE", type=FactsFile())
@click.option("--method", help="The editor: memit (default) or pmet.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=24, show_default=True, help="Use at most so many of the facts."
)
@click.option("--dry-run", is_flag=True, help="Only show what is found.")
@text_option
@format_option
@repo_option
@json_option
@reports_errors
def tune(dry_run: bool, repo: Path | None, as_json: bool, **options: Any) -> None:
    """Which layers? Try bands of layers, step sizes and lambda on some facts of FILE, and write the best into the config.

    Nothing is committed. Facts with paraphrases and neighbourhood prompts make the best judges; where they bring no
    neighbours, a third of the facts is held back and must keep its answers.
    """
    done = opened(repo).tune(dry_run=dry_run, **options)
    if as_json:
        print_json(done)
    else:
        _report_tuned(done, dry_run)


def _report_tuned(done: Tuned, dry_run: bool) -> None:
    last = [trial for trial in done.trials if trial.facts == done.facts]
    held = f" and {done.held_back} held back as neighbours" if done.held_back else ""
    say(
        f"{len(done.trials)} settings of {done.method} tried, the last {len(last)} on {count(done.facts, 'fact')}{held}:"
    )
    say(
        f"  {'layers':<9} {'step size':>9} {'lambda':>9} {'efficacy':>9} {'paraphrase':>11} {'neighbour':>10} {'score':>7}"
    )
    for place, trial in enumerate(last):
        if place < _SHOWN or place == done.present:
            say(_row(trial) + ("  as it is" if place == done.present else ""), bold=place == 0)
    for key, value in done.written.items():
        say(f"{key} = {_band(value) if isinstance(value, list) else f'{value:g}'}", fg="green")
    better = done.trials[0].score > done.trials[done.present].score
    if not better:
        say("nothing is better than the settings as they are")
    elif dry_run:
        say("a dry run: the config is as it was", dim=True)
    say(f"in {done.seconds:.1f} s", dim=True)


def _row(trial: Trial) -> str:
    marks = trial.marks
    parts = (marks.efficacy, marks.paraphrase, marks.neighborhood) if marks else (None, None, None)
    shown = [f"{part:.3f}" if part is not None else "-" for part in parts]
    return (
        f"  {_band(trial.layers):<9} {trial.learning_rate:>9g} {trial.ridge:>9g} "
        f"{shown[0]:>9} {shown[1]:>11} {shown[2]:>10} {trial.score:>7.3f}"
    )


def _band(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


COMMANDS = (
    evaluate,
    bench,
    tune,
    metric,
)
