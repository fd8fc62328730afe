"""Commands that fit the editors to a base: metric, tune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchhub.cli.habits import Group
from patchhub.cli.options import FactsFile, format_option, memory_option, text_option
from patchhub.cli.terminal import (
    count,
    json_option,
    opened,
    print_json,
    repo_option,
    reports_errors,
    say,
)

if TYPE_CHECKING:
    from patchhub.porcelain.metric import Shown
    from patchhub.porcelain.tune import Trial, Tuned


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
@memory_option("What sums and factors may take")
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


COMMANDS = (tune, metric)
