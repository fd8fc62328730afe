"""Who changes something, when, why and with which key; and durations and instants as people write them: "14 days", "36h", "2 weeks ago".

What the environment says of it (git's identity, the login name, a fixed clock) is read from a mapping that the two front floors hand in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, Final, Protocol

from patchhub.errors import SettingsError

FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
"""Instants as the store writes them, so that they sort as text."""

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "month": 30 * 86_400, "year": 365 * 86_400}
_DAYS: Final = {"today": 0, "yesterday": 1}
_DURATION: Final = re.compile(
    r"(\d{1,6})\s*(?:(seconds?|s)|(minutes?|min|m)|(hours?|h)|(days?|d)|(weeks?|w)|(months?)|(years?|y))", re.IGNORECASE
)


class Signer(Protocol):
    """A key that signs, wherever its private part is."""

    @property
    def method(self) -> str:
        """Whose form its signatures have: ``ssh``, ``model-signing``, ``certificate`` or ``sigstore``."""
        ...

    def check(self) -> None:
        """Raise `SettingsError` where it cannot sign, before work is done for it."""
        ...

    def sign(self, statement: bytes, kind: str) -> tuple[str, str]:
        """(public key, signature) of a statement of a kind; `SettingsError` where it cannot sign."""
        ...


@dataclass(frozen=True)
class Who:
    """Who changes something, when, and why.

    Attributes:
        author: a name, or "Ada <ada@example.org>".
        time: the instant, in `FORMAT`.
        message: what the change is for; where it is empty, a verb that commits finds words of its own.
        signer: the key that commits are signed with; None: they are not.

    Raises:
        SettingsError: the author is empty, or the time is not written in `FORMAT`.
    """

    author: str
    time: str
    message: str = ""
    signer: Signer | None = None

    def __post_init__(self) -> None:
        if not self.author.strip():
            raise SettingsError("the author is empty", remedy='Say who changes this, such as "Ada <ada@example.org>".')
        try:
            exact = datetime.strptime(self.time, FORMAT).strftime(FORMAT) == self.time
        except ValueError:
            exact = False
        if not exact:
            raise SettingsError(
                f"{self.time!r} is not an instant as the store writes it",
                remedy="Write it in UTC, to the second: 2026-11-21T09:30:00Z.",
            )

    def saying(self, message: str) -> Who:
        """The same, with ``message`` where none was given."""
        return self if self.message else replace(self, message=message)


def author_of(given: str | None, configured: Any, environment: Mapping[str, str]) -> str:
    """Who is told to change something, else the config's ``author``, else git's identity, else the login name.

    Args:
        environment: the variables that git runs with.

    Raises:
        SettingsError: it is no UTF-8 text.
    """
    author = str(given if given is not None else configured or _git_identity(environment) or _login())
    refuse_undecoded(author, "the author")
    return author


def now(environment: Mapping[str, str]) -> str:
    """The present instant in `FORMAT`; SOURCE_DATE_EPOCH replaces it, for runs that are to be the same again.

    Raises:
        SettingsError: SOURCE_DATE_EPOCH is no instant.
    """
    epoch = environment.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise SettingsError(
            f"SOURCE_DATE_EPOCH is {epoch!r}, which is no instant",
            remedy="Set it to whole seconds since 1970, or unset it.",
        ) from None
    return moment.strftime(FORMAT)


def refuse_undecoded(text: str, what: str) -> None:
    """Raise `SettingsError` for text that came as bytes that are not UTF-8: no object could hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"{what} {text!r} is not UTF-8 text", remedy="Write it in UTF-8.") from None


def _git_identity(environment: Mapping[str, str]) -> str | None:
    import subprocess  # here and below: only who changes something needs it

    found = []
    for key in ("user.name", "user.email"):
        try:
            result = subprocess.run(["git", "config", key], capture_output=True, check=False, env=environment)
        except OSError:
            return None
        found.append(result.stdout.decode("utf-8", errors="replace").strip())
    return f"{found[0]} <{found[1]}>" if all(found) else None


def _login() -> str:
    import getpass
    import platform

    try:
        login = getpass.getuser()
    except (KeyError, OSError, ImportError):  # no passwd entry and no variable: containers that run as a bare number
        login = "unknown"
    return f"{login} <{login}@{platform.node()}>"


def duration(text: str) -> timedelta:
    """``14 days``, ``36h``, ``2w`` or ``0``; a month is 30 days, a year 365.

    Raises:
        SettingsError: anything else.
    """
    if text.strip() == "0":
        return timedelta()
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is not a duration", remedy='Write one such as "14 days", "36 hours", "2w" or 0.')
    units = zip(_SECONDS.values(), match.groups()[1:], strict=True)
    return timedelta(seconds=int(match[1]) * next(seconds for seconds, unit in units if unit))


def instant(text: str, now: str, *, end: bool = False) -> str:
    """``2 weeks ago``, ``2026-11-21`` or ``2026-11-21T09:30:00`` (UTC unless it says otherwise), in `FORMAT`.

    Args:
        now: the present instant, in `FORMAT`.
        end: a date alone means its last second instead of its first.

    Raises:
        SettingsError: anything else.
    """
    if text.strip().lower() in _DAYS:
        day = datetime.strptime(now, FORMAT) - timedelta(days=_DAYS[text.strip().lower()])
        text = day.strftime("%Y-%m-%d")
    words = text.strip().replace(".", " ") if re.match(r"\d+[. ][a-z]", text.strip(), re.IGNORECASE) else text.strip()
    ago = re.fullmatch(r"(.+?)\s+ago|(\d+\s+[a-z]+)", words, re.IGNORECASE)  # git takes 2.weeks.ago and 2.weeks
    try:
        if ago:
            moment = datetime.strptime(now, FORMAT) - duration(ago[1] or ago[2])
        else:
            moment = _moment(text.strip(), end)
    except (ValueError, OverflowError):
        raise SettingsError(
            f"{text!r} is not a point in time",
            remedy='Write one such as 2026-11-21, 2026-11-21T09:30 or "2 weeks ago".',
        ) from None
    return moment.strftime(FORMAT)


def _moment(text: str, end: bool) -> datetime:
    if len(text) == len("2026-11-21"):
        return datetime.combine(date.fromisoformat(text), time(23, 59, 59) if end else time())
    moment = datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment
