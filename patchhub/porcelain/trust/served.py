"""`verify-served`: whether a server answers with a revision's facts. It asks over the OpenAI-compatible interface; no model runs here.

vLLM, SGLang, TGI, llama.cpp, Ollama and LM Studio answer `/v1/completions` and `/v1/chat/completions` alike. A fact counts as said
where the greedy continuation of its prompt begins with its target. Facts that the commit was noted not to say are not asked.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from patchhub.errors import RemoteError, RequestError, SettingsError
from patchhub.evaluation.guard import Report
from patchhub.objects import Request
from patchhub.progress import Progress
from patchhub.results import Result
from patchhub.sets.elements import active_requests, distinct
from patchhub.store.store import Store

Verdict = Literal["on", "off", "partly"]

_TOKENS: Final = 24  # a target of a few words, and what follows it
_SECONDS: Final = 120.0
_LARGEST: Final = 4 << 20  # bytes of an answer
_ENOUGH: Final = 0.8  # share of the facts that are said where a revision is on


@dataclass(frozen=True)
class Said(Result):
    """What the server continued a fact's prompt with, and whether that begins with the fact's target, or with what was true before."""

    prompt: str
    target: str
    continuation: str
    holds: bool
    as_before: bool


@dataclass(frozen=True)
class Served(Result):
    """Whether a server answers as a revision does.

    Attributes:
        verdict: ``on`` where at least 8 in 10 facts are said, ``off`` where none is, else ``partly``.
        model: the name that was asked.
        commit: the revision.
        answers: of each fact that was asked.
    """

    verdict: Verdict
    url: str
    model: str
    commit: str
    answers: tuple[Said, ...]

    @property
    def said(self) -> int:
        """How many facts are said."""
        return sum(answer.holds for answer in self.answers)

    def words(self) -> str:
        return f"{self.model} at {self.url}: {self.verdict}, {self.said} of {len(self.answers)} facts are said"


def verify_served(
    repository: Store,
    url: str,
    progress: Progress,
    *,
    revision: str = "HEAD",
    model: str | None = None,
    limit: int = 8,
    chat: bool = False,
) -> Served:
    """Ask a server a few facts of a revision.

    Args:
        url: where the interface begins, such as ``http://localhost:8000`` or ``http://localhost:8000/v1``.
        model: the name of the model or adapter there; None: the only one, or the first.
        limit: at most so many facts, spread over all that are active.
        chat: ask as a user's message, not as a text to continue.

    Raises:
        SettingsError: ``url`` is no http address.
        RequestError: the revision holds no fact whose text is here.
        RemoteError: the server cannot be reached, or its answers are of another form.
    """
    root = _root(url)
    commit = repository.resolve(revision)
    facts = _facts(repository, commit, limit)
    if commit is None or not facts:
        raise RequestError(
            f"{revision} holds no fact that could be asked", remedy="Name a revision with facts by --rev."
        )
    name = model or _first_model(root)
    progress.stage("asking", len(facts))
    answers = []
    for fact in facts:
        continuation = _ask(root, name, fact.text, chat=chat)
        answers.append(_judged(fact, continuation))
        progress.advance(1)
    progress.close()
    said = sum(answer.holds for answer in answers)
    verdict: Verdict = "on" if said >= _ENOUGH * len(answers) else "partly" if said else "off"
    return Served(verdict, root, name, commit, tuple(answers))


def _facts(repository: Store, commit: str | None, limit: int) -> list[Request]:
    """Facts that the model at a commit says by itself as far as is known, spread over all of them."""
    active = distinct(active_requests(repository, repository.active(commit)))
    report = Report.from_json(repository.commit(commit).check) if commit else None
    spoken = report.measured.spoken if report else None
    unsaid = {fault.request for fault in spoken.faults if fault.why == "not said"} if spoken else set()
    known = [fact for fact in active if fact.id not in unsaid] or list(active)
    step = max(1, len(known) // limit)
    return known[::step][:limit]


def _judged(fact: Request, continuation: str) -> Said:
    text = " ".join(continuation.split())
    before = fact.target_true
    return Said(
        fact.text, fact.target_new, text, text.startswith(fact.target_new), bool(before and text.startswith(before))
    )


def _root(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingsError(f"{url!r} is no address of a server", remedy="Write one such as http://localhost:8000/v1.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1"


def _first_model(root: str) -> str:
    found = _call(f"{root}/models", None)
    names = [model.get("id") for model in found.get("data", []) if isinstance(model, dict)]
    if not names or not isinstance(names[0], str):
        raise RemoteError(f"{root} names no model", remedy="Say which one is asked: --model NAME.", url=root)
    return names[0]


def _ask(root: str, model: str, prompt: str, *, chat: bool) -> str:
    options: dict[str, Any] = {"model": model, "max_tokens": _TOKENS, "temperature": 0}
    if chat:
        answer = _call(f"{root}/chat/completions", {**options, "messages": [{"role": "user", "content": prompt}]})
    else:
        answer = _call(f"{root}/completions", {**options, "prompt": prompt})
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    text = (first.get("message") or {}).get("content") if chat else first.get("text")
    if not isinstance(text, str):
        raise RemoteError(
            f"{root} answered without a text", remedy="Is it an OpenAI-compatible server? Try --chat.", url=root
        )
    return text


def _call(url: str, body: Any) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            found = json.loads(answer.read(_LARGEST))
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        raise RemoteError(
            f"{url} answered {error.code}: {said}",
            remedy="Check the address and --model NAME.",
            url=url,
            status=error.code,
        ) from None
    except (OSError, ValueError) as error:
        raise RemoteError(f"{url} cannot be asked: {error}", remedy="Is the server running there?", url=url) from None
    if not isinstance(found, dict):
        raise RemoteError(f"{url} answered with no object", remedy="Is it an OpenAI-compatible server?", url=url)
    return found
