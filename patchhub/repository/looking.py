"""Verbs that look at history and at facts."""

# No `from __future__ import annotations` here: what a verb takes is checked against its annotations when it is called.

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from patchhub.errors import RequestError, SettingsError
from patchhub.repository.arguments import (
    Count,
    Opened,
    Place,
    Quantization,
    Source,
    Type,
    path,
    place_of,
    verb,
)
from patchhub.results import Rows
from patchhub.who import instant, now

if TYPE_CHECKING:
    from patchhub.porcelain.blame import Bisection, Blame
    from patchhub.porcelain.history import Entry, Shown, Status
    from patchhub.porcelain.search import Difference, Found
    from patchhub.porcelain.trust.audit import Audit
    from patchhub.porcelain.trust.signing import Verified
    from patchhub.store.lookup import Fact


class LookingVerbs(Opened):
    """Verbs that change nothing."""

    @verb
    def status(self) -> "Status":
        """Where the repository is: branch, active facts, base."""
        from patchhub.porcelain.history import status

        return status(self.store)

    @verb
    def log(
        self,
        rev: str = "HEAD",
        *,
        limit: Count | None = None,
        all: bool = False,
        stat: bool = False,
        about: str | None = None,
        since: str | None = None,
        until: str | None = None,
        author: str | None = None,
        first_parent: bool = False,
        signatures: bool = False,
        allowed: Place | None = None,
    ) -> "Rows[Entry]":
        """The commits below a revision, newest first; each is read as it is asked for.

        Args:
            rev: a revision; ``"FROM..TO"``: what is below TO and not below FROM; or ``"ONE...OTHER"``: what is below one of them alone.
            limit: at most this many.
            all: the commits below every branch, tag and remote branch, not those below ``rev``.
            stat: say how much each commit changes.
            about: commits that added or removed a fact with this subject or text.
            since, until: ``"2026-11-21"``, ``"2026-11-21T09:30"`` or ``"2 weeks ago"``.
            author: commits whose author contains this.
            first_parent: follow the first parent of merges only.
            signatures: check who signed and approved each commit.
            allowed: the file of allowed signers; None: the config's.
        """
        self._resolve(*(end or "HEAD" for end in rev.split("..." if "..." in rev else "..", 1)))
        from patchhub.porcelain.history import log
        from patchhub.store.lookup import Selection

        today = now(os.environ)
        begin, end = (
            instant(text, today, end=late) if text else None for text, late in ((since, False), (until, True))
        )
        only = Selection(about, author, begin, end)
        options: dict[str, Any] = {"signatures": signatures, "allowed": path(allowed), "everything": all}
        return Rows(log(self.store, rev, limit=limit, only=only, first_parent=first_parent, sizes=stat, **options))

    @verb
    def verify(self, rev: str = "HEAD", *, allowed: Place | None = None, all: bool = False) -> "Verified":
        """Who signed a commit, and whether everything below it is what was signed: every object and every ref.

        Args:
            allowed: the file of allowed signers; None: the config's.
            all: check the signatures of every commit below too.
        """
        from patchhub.porcelain.trust.signing import verify

        with self._heard() as progress:
            return verify(self.store, rev, progress, allowed=path(allowed), everything=all)

    @verb
    def show(self, rev: str = "HEAD") -> "Shown | Rows[Found]":
        """One commit: its facts, how they were written, and what was measured. Or facts: who taught them, and when.

        Args:
            rev: a revision; or the subject, the text or the request id of facts; or ``"REV:FACT"``, those active there.
        """
        from patchhub.porcelain.search import shown

        found = shown(self.store, rev)
        return Rows(found) if isinstance(found, list) else found

    @verb
    def diff(
        self,
        old: str = "base",
        new: str = "HEAD",
        *,
        weights: bool = False,
        ask: Sequence[str] | None = None,
        base: Place | None = None,
    ) -> "Difference":
        """What changes from one revision to another: facts added, retargeted and removed, norms, scores.

        Args:
            old, new: two revisions, or one ``"OLD..NEW"``; ``"OLD...NEW"`` begins where the two parted.
            weights: compare the weights too: norm, rank and angle of the changes.
            ask: prompts; tells those that are answered differently.
            base: where the base model is, if it moved (for ``ask``).
        """
        if ".." in old and new == "HEAD":
            old, new = (end or "HEAD" for end in old.split("..", 1))
        if new.startswith("."):
            new = new[1:] or "HEAD"
            old = next(iter(self.merge_base(old, new)), "base")
        self._resolve(old, new)
        from patchhub.porcelain.search import diff_in_full

        place = place_of(base)
        with self._heard() as progress:
            return diff_in_full(self.store, old, new, progress, weights=weights, prompts=ask, base=place)

    @verb
    def search(self, *words: str, subject: str = "", rev: str = "HEAD", limit: Count = 50) -> "Rows[Found]":
        """Facts ever committed that hold all words: who taught them, when, and whether they are still active.

        Args:
            subject: words that must be in the fact's subject.
            rev: where a fact counts as active.
            limit: at most so many facts.
        """
        from patchhub.porcelain.search import search

        return Rows(search(self.store, " ".join(words), subject=subject, revision=rev, limit=limit))

    @verb
    def blame(
        self,
        prompt: str,
        *,
        subject: str | None = None,
        rev: str = "HEAD",
        lookup: bool = False,
        limit: Count = 10,
        base: Place | None = None,
        device: str | None = None,
        dtype: Type | None = None,
        quantization: Quantization | None = None,
        chat: bool | None = None,
    ) -> "Blame | Rows[Fact]":
        """How much each active fact, and each patch, moves the answer to a prompt.

        Args:
            subject: read the keys at the last token of this part of the prompt.
            lookup: only look the prompt up among the active facts; no model runs, and the result is those facts.
            limit: how many facts ``lookup`` lists.
        """
        self._resolve(rev)
        if lookup:
            from patchhub.porcelain.search import mentioned

            return Rows(mentioned(self.store, prompt, rev, limit=limit))
        if not prompt.strip():
            raise RequestError("the prompt is empty", remedy="Write the beginning of a sentence.")
        place, placement = self._place(base), self._placement(device, dtype, quantization)
        from patchhub.porcelain.blame import blame

        options: dict[str, Any] = {"subject": subject, "revision": rev, "base": place}
        with self._heard() as progress:
            return blame(self.store, prompt, progress, placement=placement, chat=chat, **options)

    @verb
    def bisect(
        self,
        good: str,
        bad: str,
        *command: str,
        metric: Literal["efficacy", "paraphrase", "locality", "perplexity"] | None = None,
        below: float | None = None,
        above: float | None = None,
        facts: Source = None,
        base: Place | None = None,
        device: str | None = None,
        dtype: Type | None = None,
        quantization: Quantization | None = None,
        chat: bool | None = None,
    ) -> "Bisection":
        """The first commit after one revision, up to another, at which something is broken.

        Args:
            command: a program and its arguments, which finds the checkpoint in PATCHHUB_MODEL and the commit in PATCHHUB_COMMIT; exit code
                0 means good, 125 cannot say, anything else bad.
            metric: efficacy, paraphrase, locality or perplexity, instead of a command.
            below, above: bad where the metric is below or above this.
            facts: facts to measure on, as `commit` takes them; None: the active ones.
        """
        self._resolve(good, bad)
        from patchhub.editing.requests import read_facts

        batch = None if facts is None else read_facts(facts)
        if metric is not None and below is None and above is None:
            raise SettingsError(f"{metric} has no bound", remedy="Give --below or --above and a number.")
        if bool(command) == (metric is not None):
            raise SettingsError(
                "bisect needs a command or a metric", remedy="Write `-- COMMAND` or --metric, not both."
            )
        if chat and metric is None:
            raise SettingsError("a command asks the model in its own way", remedy="Leave --chat out.")
        self._refuse_device(device)
        place = self._place(base)
        from patchhub.porcelain import blame

        with self._heard() as progress:
            if metric is None:
                ran = blame.command_check(self.store, blame.program(command, os.environ), progress, base=place)
                return blame.bisect(self.store, good, bad, ran, progress)
            requests = batch.requests if batch else blame.facts_to_measure(self.store, metric, good, bad)
            options: dict[str, Any] = {"below": below, "above": above, "base": place, "chat": chat}
            options["placement"] = self._placement(device, dtype, quantization)
            asked = blame.metric_check(self.store, metric, requests, progress=progress, **options)
            return blame.bisect(self.store, good, bad, asked, progress, chat=asked.chat)

    @verb
    def audit(
        self,
        rev: str = "HEAD",
        *,
        since: str | None = None,
        allowed: Place | None = None,
        csv: Place | None = None,
    ) -> "Audit":
        """Every change of a fact below a revision: who, when, why, on whose approval, with which evidence, and what took it back.

        Args:
            since: only changes from then on: ``"2026-11-21"``, ``"2 weeks ago"``.
            allowed: the file of allowed signers; None: the config's.
            csv: a file to write the rows to as well.
        """
        self._resolve(rev)
        from patchhub.porcelain.trust.audit import audit

        begin = instant(since, now(os.environ)) if since else None
        with self._heard() as progress:
            return audit(self.store, rev, progress, since=begin, allowed=path(allowed), csv=path(csv))

    @verb
    def merge_base(self, one: str, other: str) -> list[str]:
        """The newest commits that two revisions both have; none if they share nothing but the unpatched model."""
        from patchhub.porcelain.history import merge_bases

        return merge_bases(self.store, one, other)
