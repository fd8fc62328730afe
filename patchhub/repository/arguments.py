"""What verbs take: the kinds of arguments, their check against the annotations, and plain arguments as porcelain wants them.

A wrong type or value raises `SettingsError` with words before any work is done, and a new argument cannot go unchecked.
"""

# No `from __future__ import annotations` here and in the modules of verbs: annotations are looked at when a verb is called.

import functools
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, prod
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin
from urllib.parse import urlsplit

from patchhub.errors import BaseError, RequestError, SettingsError
from patchhub.progress import Bars, Progress
from patchhub.store.store import Store
from patchhub.who import Who, author_of, now, refuse_undecoded

if TYPE_CHECKING:
    from patchhub.editing.requests import Batch, Keep
    from patchhub.evaluation.outside import Harness, Judge
    from patchhub.porcelain.commit import Writing
    from patchhub.porcelain.measure import Facts
    from patchhub.sets.elements import OnConflict, Plan
    from patchhub.worktree.judging import Guarding

Place = str | os.PathLike[str]
"""A path."""
Count = Annotated[int, 1]
Index = Annotated[int, 0]
Amount = Annotated[float, 0]
Source = Any
"""Facts: a path, an open file, a pandas DataFrame, a datasets.Dataset, or mappings and requests in any iterable."""
FileFormat = Literal["jsonl", "json", "csv", "tsv", "yaml", "parquet"]
Metrics = Literal["auto", "counterfact", "zsre", "wise"]
Type = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]
SigningMethod = Literal["ssh", "model-signing", "certificate", "sigstore"]
Mode = Literal["retrieve", "merge"]
Settings = Mapping[str, Any] | Sequence[str]
Placed = tuple[str | None, str | None, str | None]
"""Device, type and quantisation, as they are given: what they amount to torch alone says."""


_WIDTHS: Mapping[str, int] = {"F64": 8, "I64": 8, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of a number, of those types that do not take 4."""

Method = TypeVar("Method", bound=Callable[..., Any])

SHARED: Final[Mapping[tuple[str, ...], str]] = {
    ("method",): "the editor: memit, pmet or wise; None: the config's.",
    (
        "set",
    ): """settings of the editor for this commit alone: ``{"layers": [3, 4], "ridge": 200}`` or ``["layers=3-4", "ridge=200"]``.""",
    ("strict",): "refuse facts that compete with others for a key, before anything is optimised.",
    ("all_facts",): "refuse as soon as one fact does not hold, runs on, or is said of another subject.",
    ("check",): "let the guard run the model too.",
    ("force",): "write what the guard refuses all the same; the commit says so.",
    ("base",): "where the base model is, if it moved.",
    ("device", "dtype", "quantization"): "where and in which type the base is held; None: as the config says.",
    ("chat",): "read prompts as the user's messages of the base's chat template; None: as the config says.",
    ("memory",): "bytes that may be held in memory, the model included.",
    (
        "workers",
    ): "how many processes share the work; None: this one alone, or what ``on`` has room for. A script that says so does it "
    'under ``if __name__ == "__main__":``.',
    (
        "on",
    ): """the Ray cluster that the workers run on, ``ray://HOST:10001``, ``HOST:6379`` or "auto"; None: this machine.""",
    ("sign",): "sign the commit; None: as the config says.",
    ("key",): "the file of the key to sign with; None: the config's.",
}
"""What arguments mean that several verbs take; a verb's own docstring explains the others, and those that mean something else there."""

_EXPLAINED: Final = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)

_WORDS: Mapping[Any, str] = {
    str: "text",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    Mapping: "a mapping",
    os.PathLike: "a path",
}


def verb(method: Method) -> Method:
    """Mark a method as a verb of the command line, explain what it shares with others, and refuse what its annotations do not allow."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            for one in value if many else (value,):
                check(name, one, parameter.annotation)
        return method(*args, **kwargs)

    checked.__doc__ = explained(method.__doc__ or "", signature.parameters)
    checked.is_verb = True  # type: ignore[attr-defined]  # a mark on a function, which mypy knows no attributes of
    return cast(Method, checked)


def explained(text: str, names: Collection[str]) -> str:
    """A verb's docstring, with what its arguments mean that others have too, at the end of the arguments."""
    text = inspect.cleandoc(text)
    body, raises, rest = text.partition("\n\nRaises:")
    told = {name for found in _EXPLAINED.findall(body) for name in found.split(", ")}
    shared = [
        ([name for name in group if name in names and name not in told], words) for group, words in SHARED.items()
    ]
    lines = "".join(f"\n    {', '.join(found)}: {words}" for found, words in shared if found)
    if lines and "\n\nArgs:" not in body:
        lines = f"\n\nArgs:{lines}"
    return f"{body}{lines}{raises}{rest}"


def check(name: str, value: Any, kind: Any) -> None:
    """Refuse an argument that is not of a kind, where that is an annotation that says what fits.

    Raises:
        SettingsError: it is not, or it is text that is not UTF-8.
    """
    for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple | list) else ():
        if isinstance(text, str):
            refuse_undecoded(text, name.strip("_").replace("_", " "))
    if not fits(value, kind):
        shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
        raise SettingsError(f"{name.strip('_')} cannot be {shown}", remedy=f"It is {words(kind)}.")


def fits(value: Any, kind: Any) -> bool:  # noqa: PLR0911  # one way out for each form of annotation
    """Whether a value is of a kind: a type, a union, a literal, a sequence of a kind, or a number with its least value."""
    if kind is Any or kind is inspect.Parameter.empty:
        return True
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, parts[0]) and value >= parts[1]
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits(one, parts[0]) for one in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, NoneType if kind is None else origin or kind)


def words(kind: Any) -> str:
    """A kind as an error says it: `text or None`, `one of refuse, replace, keep`, `a whole number of at least 1`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{words(parts[0])} of at least {parts[1]}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(words, parts)))
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is Sequence:
        return f"a list, each item {words(parts[0])}"
    return "None" if kind in (None, NoneType) else _WORDS.get(origin or kind, f"a {getattr(kind, '__name__', kind)}")


class Opened:
    """An open store and who hears of progress.

    Attributes:
        store: the store below: objects, refs, operations, configuration.
        progress: who hears of stages and warnings.
    """

    store: Store
    progress: Progress

    def _who(self, author: str | None, time: str | None, message: str = "") -> Who:
        return who_of(author, time, message, self.store.config.settings.get("author"))

    def _signing(
        self,
        author: str | None,
        time: str | None,
        message: str = "",
        *,
        sign: bool | None = None,
        key: Place | None = None,
        method: str | None = None,
    ) -> Who:
        """Who changes something, with a key that can sign where that is asked for, by the call or by the config."""
        who, config = self._who(author, time, message), self.store.config
        from patchhub.porcelain.trust.signing import signer_of, signs_always

        if not (sign if sign is not None else key is not None or signs_always(config)):
            return who
        interactive = sys.stdin is not None and sys.stdin.isatty()
        return replace(who, signer=signer_of(config, path(key), method, os.environ, interactive=interactive))

    def _resolve(self, *revisions: str) -> None:
        """Refuse names that lead nowhere, before torch is imported for them."""
        for rev in revisions:
            check("rev", rev, str)
            self.store.resolve(rev)

    def _place(self, base: Place | None) -> str | None:
        """Where a base is that a verb is given; a folder or Hub id that holds none, and a base that is gone, are refused before torch."""
        place = place_of(base)
        if place is None:
            self.store.config.refuse_lost_base(self.store.root)
        else:
            from patchhub.models.checkpoint import open_checkpoint

            open_checkpoint(place)
        return place

    def _placement(self, device: str | None, dtype: str | None, quantization: str | None) -> Any:
        self._refuse_device(device)
        from patchhub.worktree.opening import placement_of

        return placement_of(self.store, device=device, dtype=dtype, quantization=quantization)

    def _settings(self, given: Settings, method: str | None) -> dict[str, Any]:
        from patchhub.sets.settings import chosen_method, read_overrides, refuse_beyond

        found = read_overrides(given, chosen_method(self.store, method))
        for key, value in found.items():
            refuse_beyond(self.store, key, value)
        return found

    def _refuse_device(self, device: str | None) -> None:
        """Refuse what can be no device, and a GPU where torch cannot have one; which ones are there torch alone knows."""
        from patchhub.sets.settings import read_setting

        if device is not None:
            read_setting("device", device)
        wanted = device or self.store.config.settings.get("device") or "auto"
        if wanted == "spread" or wanted.startswith("cuda"):
            refuse_without_cuda(wanted)

    def _plan(self, batch: "Batch", on_conflict: "OnConflict", method: str | None, keeps: Sequence["Keep"]) -> "Plan":
        """What a batch of facts changes, found out before torch is imported; facts that contradict, or are there, are refused."""
        from patchhub.sets.elements import plan_batch
        from patchhub.sets.merging import refuse_stopped
        from patchhub.sets.settings import chosen_method
        from patchhub.sets.shards import METHOD

        refuse_stopped(self.store)
        by_subject = chosen_method(self.store, method) != METHOD
        return plan_batch(self.store, batch, on_conflict, by_subject=by_subject, keeps=keeps)

    def _refuse_little(self, memory: int | None) -> None:
        """Refuse a budget in which not even the base's own bytes fit."""
        if memory is None:
            return

        tensors = self.store.base.tensors.values()
        least = sum(_WIDTHS.get(tensor.dtype, 4) * prod(tensor.shape) for tensor in tensors)
        if memory < least:
            raise SettingsError(
                f"{memory / 1e6:,.0f} MB of memory do not hold the model, which takes {least / 1e6:,.0f} MB as it is stored",
                remedy=f"Give at least {ceil(2 * least / 1e6):,} MB: its float32 weights, and some for the edit.",
            )

    def _suite(self, suite: Source, metrics: str, *, text: Sequence[Place], **options: Any) -> "Facts":
        from patchhub.editing.requests import read_facts

        batch = read_facts(suite)
        read = texts(text)
        from patchhub.porcelain.measure import suite_of

        file = Path(suite) if isinstance(suite, str | os.PathLike) else None
        return suite_of(batch, file, metrics, text=read, **options)

    @contextmanager
    def _heard(self) -> Iterator[Progress]:
        """The listener, whose last bar ends with the block, whatever ends it."""
        try:
            yield self.progress
        finally:
            self.progress.close()


def listener(progress: bool | Progress) -> Progress:
    if isinstance(progress, bool):
        return Bars(lambda message: warnings.warn(message, stacklevel=2), shown=progress)
    return progress


def who_of(author: str | None, time: str | None, message: str = "", configured: Any = None) -> Who:
    return Who(author_of(author, configured, os.environ), now(os.environ) if time is None else time, message)


def judge_of(url: str | None, model: str | None, environment: Mapping[str, str]) -> "Judge | None":
    """The judge at an address, with the key that the environment holds; None without an address.

    ``PATCHHUB_JUDGE_KEY`` is meant for the judge and goes wherever that is; ``OPENAI_API_KEY`` goes only over https or to this machine.

    Raises:
        SettingsError, RemoteError: as in `judge_at`.
    """
    if url is None:
        return None
    from patchhub.evaluation.outside import judge_at, root_of

    parts = urlsplit(root_of(url))
    private = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    key = environment.get("PATCHHUB_JUDGE_KEY") or (environment.get("OPENAI_API_KEY") if private else None)
    return judge_at(url, model, key=key)


def harness_of(tasks: str, folder: Place | None, limit: int | None, *, check: bool) -> "Harness":
    """Tasks of lm-evaluation-harness, separated by commas.

    Args:
        check: refuse them where lm-evaluation-harness is not installed, before torch is imported.

    Raises:
        SettingsError: it is not.
    """
    if check and importlib.util.find_spec("lm_eval") is None:
        remedy = "Install it: `pip install 'patchhub[harness]'`."
        raise SettingsError("lm-evaluation-harness is not installed", remedy=remedy)
    from patchhub.evaluation.outside import Harness

    return Harness(tuple(task.strip() for task in tasks.split(",") if task.strip()), path(folder), limit)


def guarded_by(force: bool, check: bool) -> "Guarding":
    from patchhub.worktree.judging import Guarding

    return Guarding(force, check)


def as_written(**options: Any) -> "Writing":
    from patchhub.porcelain.commit import Writing

    return Writing(**options)


def many(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def texts(given: Sequence[Place]) -> tuple[Path, ...]:
    """Files of text, each of which can be opened: what reads them has imported torch.

    Raises:
        RequestError: one cannot.
    """
    for place in given:
        try:
            with open(place, "rb"):
                pass
        except OSError as error:
            reason = f"the text {os.fspath(place)} cannot be read ({error.strerror or error})"
            raise RequestError(reason, remedy="Give a UTF-8 text or JSON file.") from error
    return tuple(Path(place) for place in given)


def refuse_without_cuda(device: str) -> None:
    """Refuse a GPU where the torch that is installed is built without CUDA, or Linux has no driver; seconds before torch would.

    Raises:
        SettingsError: there is none.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        built = version("torch")
    except PackageNotFoundError:
        return
    reason = "this torch is built without CUDA" if built.endswith("+cpu") else None
    if reason is None and sys.platform == "linux" and not any(Path("/dev", name).exists() for name in _DRIVERS):
        reason = "this machine has no driver of one"
    if reason is not None:
        remedy = 'Choose "auto" or "cpu".'
        raise SettingsError(f"there is no device {device!r}: {reason}", remedy=remedy, device=device)


_DRIVERS: Final = ("nvidiactl", "nvidia0", "dxg", "kfd", "nvmap", "nvhost-ctrl", "nvgpu")
"""What the drivers of NVIDIA (also in WSL and on Jetson) and AMD put below /dev."""


def path(given: Place | None) -> Path | None:
    return None if given is None else Path(given)


def place_of(base: Place | None) -> str | None:
    """Where a base is: a folder or an id on the Hub.

    Raises:
        BaseError: it is written as a folder that is not there.
    """
    if base is None:
        return None
    place = os.fspath(base)
    if place.startswith(("/", ".", "~")) and not Path(place).expanduser().is_dir():
        raise BaseError(
            f"there is no model folder {place}", remedy="Give a folder with config.json and safetensors, or a Hub id."
        )
    return place


def in_bytes(gigabytes: float) -> int:
    return int(gigabytes * 1e9)
