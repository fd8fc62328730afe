"""The terminal: options that every command has, the repository that is meant, what is printed, and errors."""

from __future__ import annotations

import atexit
import difflib
import errno
import functools
import gc
import inspect
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from patchhub.canonical import UNSEEN, one_line
from patchhub.cli.habits import COMMANDS, WORDS, answered
from patchhub.errors import PatchhubError, RepositoryError
from patchhub.progress import Bars
from patchhub.results import Result, Rows
from patchhub.store.revisions import NOTES, SIGNATURES

if TYPE_CHECKING:
    from patchhub.objects import Request
    from patchhub.repository import Repository


Command = TypeVar("Command", bound=Callable[..., Any])

_UNSAFE = re.compile(f"\x1b\\[(?:[012]|3[1-6])m|(?![\n\t])([{UNSEEN}])")
"""Characters that a terminal would act upon, that turn the direction of text, or that cannot be written; the colours and weights of `say`
match whole."""

repo_option = click.option(
    "--repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that holds the store, or the store itself. Default: found upward from here.",
)
author_option = click.option("--author", help='Who makes this change, "Ada <ada@example.org>".')
_HUB_BARS: Final = "HF_HUB_DISABLE_PROGRESS_BARS"
_MADE: Final = 10_000  # objects that are made and not let go before the collector looks at them
_QUIET: Final = "patchhub.quiet"  # where a context keeps that -q was given
_LINES: Final = "patchhub.lines"  # where a context gathers what is to be paged
_UNPAGED: Final = "patchhub.unpaged"

_LOOKING: Final = frozenset(
    {
        "ask",
        "bench",
        "bisect",
        "blame",
        "branch",
        "config",
        "diff",
        "eval",
        "fsck",
        "list",
        "log",
        "merge-base",
        "metric",
        "reflog",
        "search",
        "show",
        "status",
        "tag",
    }
)
"""Commands whose whole result is what they print: -q leaves it."""

_PLAIN: Final = str.maketrans({"“": '"', "”": '"', "’": "'", "█": "#", "—": "-", "…": "...", "°": " deg"})
"""What stands for a character where the terminal's encoding has no such."""


def _keep_quiet(context: click.Context, param: click.Parameter, value: bool) -> None:
    """Note -q, and leave out the bars of the Hub's client too, which reads this variable when it is imported."""
    if value and _QUIET not in context.meta:
        context.meta[_QUIET] = True
        before = os.environ.get(_HUB_BARS)
        os.environ[_HUB_BARS] = "1"
        context.call_on_close(
            lambda: os.environ.pop(_HUB_BARS) if before is None else os.environ.update({_HUB_BARS: before})
        )


quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    hidden=True,
    callback=_keep_quiet,
    help="Say nothing but errors, warnings and what was asked for.",
)


def json_option(command: Command) -> Command:
    """``--json``, and ``-q``, which every command takes as well."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
    return as_json(quiet_option(command))


_NOT_ESCAPED_IN_JSON = re.compile(f"(?![\x00-\x1f])[{UNSEEN}]")


def opened(repo: Path | None) -> Repository:
    """The repository named by --repo (on the command or before it), or the one found upward from the working directory."""
    from patchhub.repository import Repository, open

    chosen = chosen_folder(repo)
    return open(Path.cwd(), progress=bars()) if chosen is None else Repository(chosen, progress=bars())


def chosen_folder(repo: Path | None) -> Path | None:
    """What --repo says, on the command or before it."""
    return repo or click.get_current_context().find_root().params.get("repo")


def bars() -> Bars:
    """Bars on stderr, where that is a terminal and -q was not given; warnings always."""
    return Bars(lambda message: _complain(f"{click.style('warning:', fg='yellow')} {message}"), shown=not _is_quiet())


def say(message: str = "", **style: Any) -> None:
    """One line of the result, to stdout; with -q only where a command looks and changes nothing."""
    context = click.get_current_context(silent=True)
    if context is not None and _LINES in context.meta:
        context.meta[_LINES].append(click.style(visible(message), **style))
    elif context is None or not _is_quiet() or context.info_name in _LOOKING:
        with _to_stdout():
            click.secho(_encodable(visible(message)), **style)


def talk(message: str) -> None:
    """One line beside the result, to stderr; not with -q."""
    if not _is_quiet():
        _complain(message)


def _complain(message: str) -> None:
    """One line to stderr, whatever was asked for."""
    click.echo(visible(message), err=True)


def _is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and _QUIET in context.meta


def do_not_page(context: click.Context) -> None:
    """Print everything at once, however long it is."""
    context.meta[_UNPAGED] = True


def say_all(lines: Iterable[str]) -> None:
    """Lines to stdout as they come; on a terminal that they do not fit on, through the user's pager."""
    context = click.get_current_context(silent=True)
    if context is None or _UNPAGED in context.meta or not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in lines:
            say(line)
        return
    rows = shutil.get_terminal_size().lines - 1
    coming = iter(lines)
    first = list(islice(coming, rows + 1))
    if len(first) <= rows:
        for line in first:
            say(line)
    else:
        click.echo_via_pager(f"{visible(line)}\n" for line in chain(first, coming))


@contextmanager
def paged() -> Iterator[None]:
    """Hold back what is said inside, and page it if it is long."""
    meta = click.get_current_context().meta
    meta[_LINES] = []
    try:
        yield
    finally:
        lines = meta.pop(_LINES)
        say_all(lines)


def local(instant: str) -> str:
    """An instant of the store, which is in UTC, on the clock of this machine: ``2026-11-27 10:04:12 +0100``."""
    try:
        return datetime.fromisoformat(instant.replace("Z", "+00:00")).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (ValueError, OverflowError, OSError):  # what was fetched may hold any text
        return instant


def ago(instant: str) -> str:
    """How long an instant of the store is past: ``3 hours ago``; the instant itself where it is none."""
    try:
        passed = datetime.now(timezone.utc) - datetime.fromisoformat(instant.replace("Z", "+00:00"))
    except (ValueError, OverflowError):
        return instant
    seconds = max(0, int(passed.total_seconds()))
    size, unit = next(((size, unit) for size, unit in _AGES if seconds >= size), _AGES[-1])
    return f"{count(seconds // size, unit)} ago"


_AGES: Final = (
    (365 * 86400, "year"),
    (30 * 86400, "month"),
    (7 * 86400, "week"),
    (86400, "day"),
    (3600, "hour"),
    (60, "minute"),
    (1, "second"),
)


def keep_writing() -> None:
    """Let stdout write ``?`` for what its encoding has no character for, instead of failing half-way."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="replace")


def _is_unicode(encoding: str | None) -> bool:
    return (encoding or "utf-8").lower().replace("-", "").startswith("utf")


def _encodable(text: str) -> str:
    """`text` in characters that are like it, where stdout cannot write it as it is."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if _is_unicode(encoding):
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN)
    return text


def visible(text: str) -> str:
    r"""`text` with control characters spelled out, such as ``\x1b``: stored texts may come from anyone.

    Line ends, tabs and the escapes that `click.style` makes here for colour, bold and dim stay as they are.
    """
    return _UNSAFE.sub(lambda found: _spelled(found[1]) if found[1] else found[0], text)


def _spelled(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 fact, 2 facts."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def short_ref(ref: str) -> str:
    """``main``, ``tag v1``, ``origin/main``, ``note on 0123456789ab (counterfact)``, ``signature of 0123456789ab (approval)``."""
    kind, _, name = ref.removeprefix("refs/").partition("/")
    if kind == "notes":
        commit, _, suite = name.partition("/")
        if suite.startswith(SIGNATURES):
            return f"signature of {commit[:12]} ({suite.split('/')[1]})"
        return f"note on {commit[:12]} ({suite})"
    return f"tag {name}" if kind == "tags" else name


def list_facts(sign: str, requests: Sequence[Request], colour: str, *, shown: int = 8) -> None:
    """The first few facts, a line each, and how many more there are."""
    for request in requests[:shown]:
        say(f"  {click.style(sign, fg=colour)} {request.text} {click.style(request.target_new, bold=True)}")
    if len(requests) > shown:
        say(f"  {sign} ... and {len(requests) - shown} more", dim=True)


def say_signed(repository: Repository, commit: str) -> None:
    """With which key a commit that was just made is signed, if it is."""
    prefix = f"{NOTES}{commit}/{SIGNATURES}commit/"
    for ref in repository.store.refs():
        if ref.startswith(prefix):
            from patchhub.signing.statements import fingerprint

            say(f"signed with {fingerprint(ref[len(prefix) :])}", dim=True)


def say_metadata(metadata: Mapping[str, Any]) -> None:
    """What a record says of its fact besides, a field a line."""
    for name, value in sorted(metadata.items()):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        say(f"      {one_line(name)}: {one_line(text)}", dim=True)


def say_stale_shards(number: int) -> None:
    """That thresholds were measured on other weights than there are now, if any were."""
    if number:
        say(
            f"note: the threshold of {count(number, 'shard')} is stale, since weights below changed; "
            "`patchhub refresh` measures it again",
            dim=True,
        )


def say_trained(repository: Repository, shards: Sequence[str]) -> None:
    """Which shards were trained again, and on how many facts."""
    for shard in shards:
        patch = repository.store.patch(shard)
        number, facts = patch.settings["number"], count(len(patch.requests), "fact")
        say(f"shard {number} ({shard[:12]}) was trained again, on the {facts} that it holds now")


def print_json(document: Any) -> None:
    """A document as JSON; a result or a list of results as the document that it is."""
    document = document.to_json() if isinstance(document, Result | Rows) else document
    escaped = not _is_unicode(getattr(sys.stdout, "encoding", None))
    text = json.dumps(document, ensure_ascii=escaped, indent=2, sort_keys=True)
    with _to_stdout():
        click.echo(_NOT_ESCAPED_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


@contextmanager
def _to_stdout() -> Iterator[None]:
    """Turn a failure to write to stdout into a `RepositoryError`; a closed pipe is left to click, which ends without a word.

    What could not be written goes nowhere afterwards, so that the interpreter does not try it again when it ends.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise RepositoryError(
            f"cannot write to the standard output: {error.strerror or error}",
            remedy="Free space there, or write elsewhere.",
            errno=error.errno,
        ) from error


def quiet_libraries() -> None:
    """Keep the model libraries' own notices off the terminal; to be called before they are imported."""
    for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes every product that it casts


def collect_seldom() -> None:
    """Look for garbage in cycles less often, and not when the process ends.

    torch and transformers make a million objects that stay. By default Python goes through all of them again and again while they are
    made: that was a fifth of the CPU time of a commit of one fact.
    """
    gc.set_threshold(_MADE, *gc.get_threshold()[1:])
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def reports_errors(command: Command) -> Command:
    """Print a PatchhubError as one line and its remedy, or as JSON under --json, and exit with its code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PatchhubError as error:
            if kwargs.get("as_json"):
                click.echo(json.dumps({"error": error_json(error)}, ensure_ascii=False), err=True)
            else:
                _complain(f"{click.style('error:', fg='red', bold=True)} {error.message}")
                if error.remedy:
                    _complain(f"  {_sentence(error.remedy)}")
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            _complain("interrupted; the store is as it was")
            raise SystemExit(130) from None

    return cast(Command, wrapped)


def together(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several decorators as one, in the order in which they would stand one below the other."""

    def decorate(command: Command) -> Command:
        decorated: Any = command
        for decorator in reversed(decorators):
            decorated = decorator(decorated)
        return cast(Command, decorated)

    return decorate


store_options: Final = together(repo_option, json_option, reports_errors)
"""What every command has that asks a store."""


def error_json(error: PatchhubError) -> Mapping[str, Any]:
    return {
        "kind": error.kind,
        "message": error.message,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
        "facts": {key: value if _is_json(value) else str(value) for key, value in error.facts.items()},
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


SUBCOMMANDS: Final[Mapping[tuple[str, str], str]] = {
    ("remote", "rm"): "remove",
    ("remote", "ls"): "list",
    ("remote", "mv"): "rename",
    ("op", "ls"): "log",
    ("op", "list"): "log",
}
"""Other spellings of the commands of a group."""

_ALONE: Final[Mapping[str, str]] = {"remote": "list", "op": "log"}
"""What a group does where no command follows, as in git and jj."""

_ALIKE_COMMAND: Final = 0.75  # commands are short: two letters of four that changed places leave three quarters
_TYPED: Final = "patchhub.typed"  # where a context keeps its arguments as they were typed
_COUNT: Final = re.compile(r"-(\d+)")


class Group(click.Group):
    """Commands in the order in which a new user meets them; what is mistyped is answered with what was meant.

    Attributes:
        sections: titles of groups of commands, as the help lists them, each with the names of its commands.
    """

    def __init__(self, *args: Any, sections: Mapping[str, tuple[str, ...]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sections = sections or {}

    def main(self, *args: Any, **options: Any) -> Any:
        keep_writing()
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each section of commands with the first sentence of their help."""
        for title, names in (self.sections or {"Commands": tuple(self.commands)}).items():
            with formatter.section(title):
                formatter.write_dl([(name, _first_sentence(self.commands[name])) for name in names])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta.setdefault(_TYPED, list(args))
        with _answered(ctx):
            return self._parsed(ctx, args)

    def _parsed(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [part for place in range(len(args)) for part in _spelled_out(args, place)]
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None:
            here = " ".join(["patchhub", *ctx.command_path.split()[1:]])
            if ctx.parent is None and name in COMMANDS:
                raise click.UsageError(f"patchhub has no command {name!r}. {COMMANDS[name]}")
            close = difflib.get_close_matches(name, self.commands, n=1, cutoff=_ALIKE_COMMAND)
            hint = f" Did you mean `{here} {close[0]}`?" if close else f" See `{here} --help`."
            raise click.UsageError(f"there is no command {name!r}.{hint}")
        first = args[1] if len(args) > 1 else ""
        if (name, first) in WORDS:
            raise click.UsageError(f"patchhub {name} has no {first}. {WORDS[name, first]}")
        if (name, first) == ("reflog", "show"):  # git's full word for it
            args = [name, *args[2:]]
        if isinstance(self.get_command(ctx, name), click.Group):
            args = [name, *_of_group(name, args[1:], alone=not ctx.resilient_parsing)]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _answered(ctx):
            return super().invoke(ctx)


@contextmanager
def _answered(ctx: click.Context) -> Iterator[None]:
    """Say of a usage error what was meant, as JSON where that was asked for."""
    try:
        yield
    except click.UsageError as error:
        told = answered(error)
        if "--json" in ctx.meta[_TYPED]:
            document = {"kind": "usage", "message": told.format_message()}
            click.echo(json.dumps({"error": document}, ensure_ascii=False), err=True)
            ctx.exit(told.exit_code)
        raise told from None


def _of_group(name: str, args: list[str], *, alone: bool) -> list[str]:
    """What follows the name of a group, in this tool's words: ``rm x`` as ``remove x``, and ``-v`` ``alone`` as ``list``."""
    if alone and name in _ALONE and all(word in ("-v", "--verbose", "--json", "-q", "--quiet") for word in args):
        return [_ALONE[name], *(word for word in args if word not in ("-v", "--verbose"))]
    return [SUBCOMMANDS.get((name, word), word) if place == 0 else word for place, word in enumerate(args)]


def _first_sentence(command: click.Command) -> str:
    """How a command's help begins, up to its first full stop."""
    paragraph = " ".join(inspect.cleandoc(command.help or "").partition("\n\n")[0].split())
    found = re.match(r".*?[.](?=\s|$)", paragraph)
    return found[0] if found else paragraph


def _spelled_out(args: list[str], place: int) -> tuple[str, ...]:
    """``-3`` after ``log`` as ``-n 3``; everything else as it is."""
    count = _COUNT.fullmatch(args[place]) if "log" in args[:place] else None
    return ("-n", count[1]) if count else (args[place],)
