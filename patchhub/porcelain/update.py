"""`update`: give one active fact another target, in one commit that removes the old request and adds the new one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from patchhub.canonical import nfc
from patchhub.editing.requests import Batch, Origin
from patchhub.errors import RequestError
from patchhub.objects import Request
from patchhub.porcelain.edit import Committed, commit
from patchhub.porcelain.facts import active_requests, distinct
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.snapshot import Stamp
from patchhub.store.repository import Repository

_LISTED = 8


def update(
    repository: Repository,
    subject: str,
    target: str,
    stamp: Stamp,
    progress: Progress,
    *,
    prompt: str | None = None,
    method: str = "memit",
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    force: bool = False,
) -> Committed:
    """Retarget the active fact about a subject; its evaluation prompts stay.

    Args:
        subject: as it is in the fact.
        prompt: which of the subject's facts, with ``{}`` or with the subject filled in; needed only where it has several.
        method, settings, strict, force: as in `commit`.

    Raises:
        RequestError: no active fact is meant, or several are, or it says so already.
        BaseError, EditError, GuardError: as in `commit`.
    """
    facts = distinct(active_requests(repository, repository.active(repository.head[1])))
    chosen = _chosen(facts, nfc(subject).strip(), None if prompt is None else nfc(prompt).strip())
    new = _retargeted(chosen[0], target)
    if any(fact.target_new == new.target_new for fact in chosen):
        raise RequestError(
            f"'{new.text}' is '{new.target_new}' already",
            remedy="Give another target; `patchhub revert --request` takes back one of several that contradict each other."
            if len(chosen) > 1
            else "Give another target.",
        )
    before = ", ".join(fact.target_new for fact in chosen)
    message = stamp.message or f"{new.text}: {before} -> {new.target_new}"
    return commit(
        repository,
        Batch((new,), (Origin("update"),), 0),
        Stamp(stamp.author, stamp.time, message),
        progress,
        method=method,
        settings=settings,
        on_conflict="replace",
        strict=strict,
        force=force,
    )


def _chosen(facts: Sequence[Request], subject: str, prompt: str | None) -> list[Request]:
    """The active requests of the one prompt about a subject that is meant."""
    about = [fact for fact in facts if fact.subject == subject]
    if not about:
        close = difflib.get_close_matches(subject, sorted({fact.subject for fact in facts}), n=1)
        remedy = f"Did you mean '{close[0]}'?" if close else "`patchhub commit` writes a new fact."
        raise RequestError(f"no active fact is about '{subject}'", remedy=remedy, subject=subject)
    found = [fact for fact in about if prompt is None or prompt in (fact.prompt, fact.text)]
    prompts = sorted({fact.prompt for fact in found or about})
    if len(prompts) == 1 and found:
        return found
    listed = "; ".join(prompts[:_LISTED]) + ("; ..." if len(prompts) > _LISTED else "")
    problem = f"{len(prompts)} active facts are" if found else f"no active fact with the prompt {prompt!r} is"
    raise RequestError(
        f"{problem} about '{subject}'", remedy=f"Say which with --prompt: {listed}", subject=subject, prompts=prompts
    )


def _retargeted(fact: Request, target: str) -> Request:
    """The request with another target. Where that is the true answer, there is nothing left to compare it with."""
    new = Request.make(fact.prompt, fact.subject, target)
    return Request(
        prompt=fact.prompt,
        subject=fact.subject,
        target_new=new.target_new,
        target_true=None if new.target_new == fact.target_true else fact.target_true,
        paraphrases=fact.paraphrases,
        neighborhood=fact.neighborhood,
    )
