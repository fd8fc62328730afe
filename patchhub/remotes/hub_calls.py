"""Calls to the Hub: repeated where repeating is safe, their many exceptions turned into `RemoteError`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from patchhub.errors import PatchhubError, RemoteError

Result = TypeVar("Result")
Sleep = Callable[[float], None]

ATTEMPTS: Final = 5
MAX_WAIT: Final = 300.0
"""Seconds that a server may make us wait at once."""

DOWNLOAD_ATTEMPTS: Final = 2
"""The client repeats downloads by itself, but not one whose connection was reset."""

TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})

_REMEDIES: Final = {
    401: "Log in with `hf auth login`, or check the token.",
    402: "The account's storage is full; see its settings on the Hub.",
    403: "Log in with a token that may write to it: `hf auth login`.",
    404: "Check the name; if it is private, log in with `hf auth login`.",
    413: "It is larger than the Hub takes.",
    429: "The Hub asks for patience; try again later.",
}
_TRY_AGAIN: Final = "Check the connection and run the command again."
_NO_XET: Final = (
    "If the server offers no Xet, set HF_HUB_DISABLE_XET=1; else check the connection. Then run the command again."
)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception stands for; None if there was no answer."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None and error.__cause__ is not None:
        return status_of(error.__cause__)
    return int(status) if status is not None else None


def is_missing(error: BaseException) -> bool:
    """Whether it says that the repository is not there, or not visible."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return isinstance(error, RepositoryNotFoundError)


def waiting_time(error: BaseException, attempt: int) -> float:
    """Seconds until the next attempt: what the server asks for (Retry-After), else 1, 2, 4, 8."""
    response: Any = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), MAX_WAIT) if asked.isdecimal() else float(2**attempt)


def read_call(place: str, call: Callable[[], Result], *, sleep: Sleep = time.sleep, attempts: int = ATTEMPTS) -> Result:
    """The result of a call that changes nothing, repeated while it fails for reasons that pass.

    Args:
        place: what is called, for messages.
        attempts: fewer where the client repeats most of the call by itself.

    Raises:
        RemoteError: it kept failing, or failed for good.
    """
    for attempt in range(attempts):
        try:
            return call()
        except PatchhubError:
            raise
        except Exception as error:  # the client raises errors of several libraries
            if attempt == attempts - 1 or not _passes(error):
                raise explained(place, error) from error
            sleep(waiting_time(error, attempt))
    raise AssertionError("unreachable")


def write_call(call: Callable[[], Result], *, sleep: Sleep) -> Result:
    """The result of a call that changes something, repeated only while it is refused before anything is done (429).

    Raises:
        Exception: whatever the last attempt raised.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:  # the client raises errors of several libraries
            if status_of(error) != 429:
                raise
            sleep(waiting_time(error, attempt))
    return call()


def _passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if _cause(error, OfflineModeIsEnabled) or isinstance(error, ValueError):
        return False
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)


def explained(place: str, error: BaseException) -> RemoteError:
    """What went wrong, in one sentence, and what to do."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    status = status_of(error)
    facts = {"remote": place, "status": status, "cause": type(error).__name__}
    if _cause(error, OfflineModeIsEnabled):
        return RemoteError(f"{place} cannot be reached: offline mode is on", remedy="Unset HF_HUB_OFFLINE.", **facts)
    if isinstance(error, GatedRepoError):
        return RemoteError(f"{place} needs its owner's permission", remedy="Ask for access on its page.", **facts)
    if is_missing(error):
        return RemoteError(f"{place} does not exist or is private", remedy=_REMEDIES[404], **facts)
    reason = _reason(error)
    if status is None:
        remedy = _NO_XET if "/xet-" in reason else _TRY_AGAIN
        return RemoteError(f"{place} cannot be reached: {reason}", remedy=remedy, **facts)
    return RemoteError(
        f"{place} answered {status}: {reason}", remedy=_REMEDIES.get(status, "Run the command again later."), **facts
    )


def _reason(error: BaseException) -> str:
    """The first line of what the server or else the client says, and of what was behind it."""
    said = (getattr(error, "server_message", None) or str(error)).strip().partition("\n")[0] or type(error).__name__
    behind = "" if error.__cause__ is None else _reason(error.__cause__)
    return said if behind in said else f"{said} ({behind})"


def _cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False
