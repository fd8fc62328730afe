"""Options that several commands share: where the base is put, and how a change is guarded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from patchhub.cli.terminal import count, say
from patchhub.errors import PatchhubError
from patchhub.evaluation.guard import Fault, Measured, Report, Share, Spoken

if TYPE_CHECKING:
    from patchhub.porcelain.trust.signing import Vouched
    from patchhub.store.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)?")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "kiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Size(click.ParamType[int]):
    """Bytes from ``4GB``, ``800MB``, ``3.5GiB``; a number alone is in gigabytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _SIZE.fullmatch(str(value).strip())
        if found is None or not (size := int(float(found[1]) * _UNITS.get(found[2] or "GB", 0))):
            self.fail(f"{value!r} is not a size; write 4GB, 800MB or 3.5GiB", param, ctx)
        return size


class Revision(click.ParamType[str]):
    """A revision; the shell completes names of branches, tags and remote branches, also behind the dots of a range."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, dots, typed = incomplete.rpartition("..")
        return [CompletionItem(f"{before}{dots}{name}") for name in _found(ctx, _ref_names) if name.startswith(typed)]


class SettingKey(click.ParamType[str]):
    """The name of a setting, which the shell completes."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from patchhub.sets.settings import SETTINGS

        return [CompletionItem(name) for name in SETTINGS if name.startswith(incomplete)]


class Subject(click.ParamType[str]):
    """Words of a fact's subject; the shell completes subjects of facts."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _found(ctx, lambda store: _subjects(store, incomplete))]


class Shown(Revision):
    """A revision, or what a fact is called, also behind the colon of REV:FACT."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        rev, colon, typed = incomplete.partition(":")
        if colon:
            return [CompletionItem(f"{rev}:{name}") for name in _found(ctx, lambda store: _subjects(store, typed))]
        names = [*_found(ctx, _ref_names), *_found(ctx, lambda store: _subjects(store, incomplete))]
        return [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]


class RemoteName(click.ParamType[str]):
    """The name of a remote, which the shell completes."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        settings = _found(ctx, lambda store: store.config.settings)
        names = [key.removeprefix("remote.") for key in settings if key.startswith("remote.")]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _subjects(store: Store, beginning: str) -> list[str]:
    from patchhub.store.lookup import subjects

    return subjects(store, beginning)


def _ref_names(store: Store) -> list[str]:
    kept = [ref for ref in store.refs() if not ref.startswith("refs/notes/")]
    return [ref.split("/", 2)[2] if ref.startswith("refs/") else ref for ref in kept]


def _found(ctx: click.Context, read: Callable[[Store], Iterable[str]]) -> list[str]:
    """What a store says while a command is being typed; nothing where there is none: a shell shows no errors."""
    from patchhub.store.store import Store

    folder = ctx.params.get("repo") or ctx.find_root().params.get("repo")
    try:
        with Store.discover(Path.cwd()) if folder is None else Store.open(folder) as store:
            return list(read(store))
    except (PatchhubError, OSError):
        return []


class FactsFile(click.ParamType[Any]):
    """A file of facts; ``-`` is standard input."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-":
            return sys.stdin.buffer
        return value if str(value).startswith("hf://") else Path(value)


def memory_option(purpose: str) -> Callable[[Command], Command]:
    """``--memory``: how much a command may take, in bytes; None where it is not given."""
    return click.option("--memory", type=Size(), metavar="SIZE", help=f"{purpose}, such as 8GB.")


metrics_option = click.option(
    "--metrics",
    type=click.Choice(["auto", "counterfact", "zsre", "wise"]),
    default="auto",
    show_default=True,
    help="Whose scores; auto: zsRE's for a file of its records, else CounterFact's.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), help="At most so many facts: the first ones, or with --seed a sample."
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), help="Of the sample, of sampled text and of the intervals."
)
format_option = click.option(
    "--format", type=click.Choice(["jsonl", "json", "csv", "tsv", "yaml", "parquet"]), help="How to read FILE."
)
text_option = click.option(
    "--text", multiple=True, type=click.Path(path_type=Path), help="Text for the metric (first commit only)."
)
base_option = click.option("--base", help="Where the base model is, if it moved.")
chat_option = click.option(
    "--chat/--no-chat", default=None, help="Read prompts as the user's messages of the base's chat template."
)


def placement_options(command: Command) -> Command:
    """``--device``, ``--dtype`` and ``--quantization``; without them the repository's config decides."""
    options: tuple[Any, ...] = (
        click.option(
            "--device",
            help="auto (a GPU if there is one), spread (over all GPUs), stream (blocks are read from the base's files as they are run), "
            "cpu, cuda:0, ...",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Type of the base in memory. auto: float32 where that takes half of a CPU's memory or a tenth of a GPU's at most, else "
            "its own.",
        ),
        click.option(
            "--quantization",
            type=click.Choice(["none", "8bit", "4bit"]),
            help="Quantise the base in memory; changes run beside its weights in float32.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def workers_options(command: Command) -> Command:
    """``--workers`` and ``--on``: other processes that do the work."""
    options: tuple[Any, ...] = (
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            metavar="N",
            help="Optimise facts, read the base, ask the model in N processes. Default: in this one; with --on as there is room.",
        ),
        click.option(
            "--on",
            metavar="ADDRESS",
            help="The Ray cluster of the workers: ray://HOST:10001, HOST:6379, auto (docs/scale.md).",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


force_option = click.option(
    "--force", is_flag=True, help="Write what the guard refuses all the same; the commit says so."
)
check_option = click.option(
    "--check", is_flag=True, help="Let the guard run the model too: whether facts hold, whether other text drifts."
)


sign_option = click.option(
    "-s", "--sign/--no-sign", default=None, help="Sign it with a key. Default: as the config's `sign` says."
)
key_option = click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The private key to sign with, or its public key where an agent holds it. Default: the config's.",
)
allowed_option = click.option(
    "--allowed",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of allowed signers, as OpenSSH has it. Default: the config's `sign.allowed`.",
)
required_option = click.option(
    "--require-signed",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Let in only branches and tags that somebody in this file of allowed signers signed.",
)

_FAULTS = 8


def say_lost(check: Mapping[str, Any]) -> None:
    """How many of the earlier facts that the guard read a commit lost, where there are any; `check` is the commit's."""
    report = Report.from_json(check)
    lost = report.measured.earlier if report else None
    if lost and lost.count:
        say(f"  {_of(lost, 'earlier fact')} {_verb(lost, 'is', 'are')} no longer the model's answer", fg="yellow")


def say_faults(faults: Sequence[Fault]) -> None:
    """What the model writes where that does not read right, a line each."""
    for line in fault_lines(faults[:_FAULTS]):
        say(f"  {line}", fg="yellow")
    if len(faults) > _FAULTS:
        say(f"  ... and {len(faults) - _FAULTS} more (--json lists them)", fg="yellow")


def fault_lines(faults: Iterable[Fault]) -> Iterator[str]:
    """`runs on: "The capital of Kazakhstan is" is followed by "Astanaq."`."""
    for fault in faults:
        meant = f", not {fault.target!r}" if fault.why == "not said" else ""
        yield f"{fault.why}: {fault.prompt!r} is followed by {fault.continuation.strip()!r}{meant}"


def guard_summary(check: Mapping[str, Any]) -> str:
    """One line on what the guard found when a commit was made; empty where it was not asked."""
    report = Report.from_json(check)
    if report is None:
        return ""
    if report.failed:
        return click.style(f"forced although {'; '.join(report.failed)}", fg="red")
    return ", ".join(["passed", *_short(report.measured)])


def guard_lines(check: Mapping[str, Any]) -> Iterator[str]:
    """All that the guard measured, a sentence each; nothing where it was not asked."""
    report = Report.from_json(check)
    if report is None:
        return
    for failed in report.failed:
        yield click.style(f"guard: forced although {failed}", fg="red")
    if not report.failed:
        yield "guard: passed" + (" (--force was given)" if report.forced else "")
    yield from (f"  {words}" for words in (*_facts(report.measured), *_weights(report.measured)))


def _short(found: Measured) -> Iterator[str]:
    if found.own and found.own.of:
        yield f"{found.own.count}/{found.own.of} new facts hold"
    if found.earlier and found.earlier.of:
        yield f"{found.earlier.count}/{found.earlier.of} earlier ones lost"
    if found.spoken and found.spoken.closed.of:
        yield f"{found.spoken.closed.count}/{found.spoken.closed.of} read right"
    if found.spoken and found.spoken.leak and found.spoken.leak.count:
        yield f"{found.spoken.leak.count}/{found.spoken.leak.of} prompts about others say a new target"
    if found.drift:
        yield f"held text moved by {found.drift.kl:.3f} nats"


def _facts(found: Measured) -> Iterator[str]:
    if found.own and found.own.of:
        yield f"{_of(found.own, 'new fact')} {_verb(found.own, 'is', 'are')} the model's answer"
    yield from _spoken(found.spoken) if found.spoken else ()
    if found.about and found.about.of:
        kept = found.about.count / found.about.of
        said = (
            f"of what the model said of the subjects before, {kept:.0%} of the words are still what it would say next"
        )
        yield f"{said} (not judged; the setting `essence` keeps more)"
    if found.earlier and found.earlier.of:
        lost = f"that {_verb(found.earlier, 'was read and held is', 'were read and held are')} lost"
        yield f"{_of(found.earlier, 'earlier fact')} {lost} ({found.active} active)"
    if found.drift:
        guessing = "; the base itself is guessing, so this is not judged" if found.drift.guessing else ""
        yield (
            f"drift from the base on held text {found.drift.kl:.3f} nats per token ({found.drift.kl_before:.3f} before), perplexity "
            f"times {found.drift.perplexity_ratio:.3f}, over {found.drift.positions} tokens{guessing}"
        )
    if found.unmet and found.unmet.of:
        gets = _verb(found.unmet, "gets less than half of its", "get less than half of their")
        yield f"{_of(found.unmet, 'new or contradicted fact')} {gets} change"
    if found.crushed and found.crushed.of:
        gets = _verb(found.crushed, "gets less than half of what it asks for", "get less than half of theirs")
        yield f"{_of(found.crushed, 'other fact')} now {gets}"
    if found.first_token:
        yield f"{found.first_token} of the subjects end at the first token, where the keys of all texts are alike"


def _spoken(found: Spoken) -> Iterator[str]:
    """What the model writes by itself, and the worst of it."""
    if found.said.of:
        said = f"{_of(found.said, 'new fact')} {_verb(found.said, 'is', 'are')} said"
        yield f"written freely, {said}, {found.closed.count} with the word's end after it"
    if found.leak and found.leak.of:
        yield f"{_of(found.leak, 'prompt')} about other subjects {_verb(found.leak, 'says', 'say')} a new target now"
    if found.namesakes and found.namesakes.count:
        say = _verb(found.namesakes, "says", "say")
        alike = f"{_of(found.namesakes, 'invented name')} with a subject's last word {say} a new target now"
        yield f"{alike} (not judged; `--keep auto` keeps such names)"
    yield from (f"  {line}" for line in fault_lines(found.faults[:_FAULTS]))
    if found.chat and found.chat.said.of:
        said = f"{_of(found.chat.said, 'new fact')} {_verb(found.chat.said, 'is', 'are')} said"
        yield f"asked in a chat, {said}, {found.chat.closed.count} with the word's end after it (not judged)"
        yield from (f"  {line}" for line in fault_lines(found.chat.faults[:_FAULTS]))


def _of(share: Share, noun: str) -> str:
    return f"{share.count} of {count(share.of, noun)}"


def _verb(share: Share, one: str, many: str) -> str:
    return one if share.of == 1 else many


def _weights(found: Measured) -> Iterator[str]:
    if found.spectrum:
        largest = max(values["state"] / (values["base"] or 1.0) for values in found.spectrum.values())
        yield f"largest singular value of a weight's change: {largest:.2f} times the base weight's"
    if found.survival:
        yield f"rounding to the base's type keeps at least {min(found.survival.values()):.1%} of the change"


def signature_line(found: Vouched) -> str:
    """A signature in words, coloured by what checking it found."""
    colour = {"good": "green", "broken": "red"}.get(found.status, "yellow")
    why = f": {found.message}" if found.message else ""
    return f"{click.style(found.words(), fg=colour)}{why}"


def short_signatures(found: Sequence[Vouched]) -> str:
    """Who signed a commit and who approved it, in a few words."""
    parts = []
    for kind, verb in (("commit", "signed"), ("approval", "approved")):
        whose = [signature for signature in found if signature.kind in (kind, None if kind == "commit" else kind)]
        named = sorted({str(signature.principal) for signature in whose if signature.status == "good"})
        named += sorted({f"an {s.status} key" for s in whose if s.status == "unknown"})
        named += sorted({f"{s.status.upper()} {s.note[:12]}" for s in whose if s.status in ("broken", "unchecked")})
        parts += [f"{verb} by {', '.join(named)}"] if named else []
    return click.style("; ".join(parts), fg="cyan") if parts else click.style("unsigned", fg="yellow")
