"""Verbs that commit."""

# No `from __future__ import annotations` here: what a verb takes is checked against its annotations when it is called.

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchhub.errors import PatchhubError, RevisionError, SettingsError
from patchhub.progress import Progress
from patchhub.repository.arguments import (
    Amount,
    Count,
    FileFormat,
    Opened,
    Place,
    Placed,
    Quantization,
    Settings,
    Source,
    Type,
    as_written,
    guarded_by,
    many,
    place_of,
    texts,
    verb,
)
from patchhub.store.store import Store
from patchhub.who import Who

if TYPE_CHECKING:
    from patchhub.porcelain.change import Changed, Squashed
    from patchhub.porcelain.commit import Committed, Refreshed
    from patchhub.porcelain.exchange import Imported
    from patchhub.porcelain.merge import Aborted, Merged, Prediction, Stopped


def _amended(store: Store, message: str, *, amend: bool, unchanged: bool) -> str | None:
    """The commit that is amended; None for a new one.

    Args:
        unchanged: there are neither facts nor another author or key.

    Raises:
        RevisionError: there is none to amend.
        SettingsError: a new commit has no message, or there is nothing to amend.
    """
    amended = store.head[1] if amend else None
    if amend and amended is None:
        raise RevisionError(
            "there is no commit yet to amend", remedy="Commit some facts: `patchhub commit FILE -m TEXT`."
        )
    if not message.strip() and not amend:
        raise SettingsError("a commit needs a message", remedy="Say why: `patchhub commit FILE -m TEXT`.")
    if not message.strip() and unchanged:
        raise SettingsError(
            "there is nothing to amend: neither facts nor a message",
            remedy="`patchhub commit --amend -m TEXT` says why in other words, `patchhub commit --amend FILE` adds facts.",
        )
    return amended


def _joined(store: Store, done: "Committed", who: Who, progress: Progress, amended: str, *, force: bool) -> "Committed":
    """A commit and the one that it amends as one; where that is refused, neither is changed."""
    from patchhub.porcelain.change import amend

    try:
        return replace(done, commit=amend(store, who, progress, amended, guarding=guarded_by(force, False)))
    except PatchhubError:
        store.undo(author=who.author, time=who.time)
        raise


class WritingVerbs(Opened):
    """Verbs that make a commit: each refuses a stopped merge, and is judged by the guard."""

    @verb
    def commit(
        self,
        facts: Source = None,
        *,
        message: str = "",
        amend: bool = False,
        method: str | None = None,
        prompt: str | None = None,
        subject: str | None = None,
        target: str | None = None,
        format: FileFormat | None = None,
        text: Sequence[Place] = (),
        keep: Source = None,
        on_conflict: Literal["refuse", "replace", "keep"] = "refuse",
        set: Settings = (),
        strict: bool = False,
        all_facts: bool = False,
        force: bool = False,
        device: str | None = None,
        dtype: Type | None = None,
        quantization: Quantization | None = None,
        chat: bool | None = None,
        memory: Count | None = None,
        workers: Count | None = None,
        on: str | None = None,
        sign: bool | None = None,
        key: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Committed":
        """Write facts into the model, as a new commit.

            repo.commit([{"prompt": "The capital of {} is", "subject": "Kenya", "target_new": "Oslo"}], message="Why")

        Args:
            facts: a path, an open file, a pandas DataFrame, a datasets.Dataset, or mappings and requests in any iterable; ``format``
                says how to read a file. Or none, and one fact by ``prompt``, ``subject`` and ``target``.
            message, amend: why; to amend puts the facts into the last commit, or without facts gives it another message and author.
            text: files to compute the metric from; only before the first commit.
            keep: prompts whose answers must stay, as facts are given; without ``target_new``, what the model says now stays. "auto": the
                same prompts about others of the facts' kind, four for each, and about four names that end in each subject's last word.
            on_conflict: when an active fact says otherwise about the same prompt and subject.

        Raises:
            RequestError: there are no facts, they are malformed, contradict one another or an active fact.
            EditError: the edit failed, or the guard refused it; nothing was committed.
        """
        who = self._signing(author, time, message, sign=sign, key=key)
        one = {"prompt": prompt, "subject": subject, "target": target}
        bare = facts is None and not any(one.values())
        amended = _amended(self.store, message, amend=amend, unchanged=bare and not (author or sign or key))
        who = who if amended is None else who.saying(self.store.commit(amended).message)
        if amended is not None and bare:
            return self._renamed(who, amended)
        options: dict[str, Any] = {"method": method, "on_conflict": on_conflict, "strict": strict, "memory": memory}
        options |= {"workers": workers, "on": on, "set": set, "text": text, "keep": keep, "chat": chat}
        options |= {"placed": (device, dtype, quantization), "force": force, "all_facts": all_facts}
        return self._written((facts, format, one), who, amended, **options)

    def _written(
        self,
        facts: tuple[Source, FileFormat | None, Mapping[str, str | None]],
        who: Who,
        amended: str | None,
        *,
        set: Settings,
        text: Sequence[Place],
        keep: Source,
        placed: Placed,
        chat: bool | None,
        force: bool,
        all_facts: bool,
        **options: Any,
    ) -> "Committed":
        """Facts as a commit, or as a part of the amended one; ``options`` are those of `Writing` that are taken as they are given."""
        from patchhub.editing.requests import read_facts, read_keeps

        source, format_, one = facts
        batch = read_facts(source, format=format_, **one)
        found = isinstance(keep, str | PathLike) and str(keep) == "auto"
        keeps = () if found else read_keeps(keep)
        settings, read = self._settings(set, options["method"]), texts(text)
        self._refuse_little(options["memory"])
        plan = self._plan(batch, options["on_conflict"], options["method"], keeps)
        placement = self._placement(*placed)
        from patchhub.porcelain.commit import commit

        how = as_written(settings=settings, text=read, keep=keeps, find_keeps=found, **options)
        held: dict[str, Any] = {"placement": placement, "chat": chat, "plan": plan}
        with self._heard() as progress:
            done = commit(self.store, batch, who, progress, how, force=force, all_facts=all_facts, **held)
            return done if amended is None else _joined(self.store, done, who, progress, amended, force=force)

    def _renamed(self, who: Who, amended: str) -> "Committed":
        """The last commit with another message and author."""
        from patchhub.porcelain.change import amend
        from patchhub.porcelain.commit import Committed

        with self._heard() as progress:
            return Committed(amend(self.store, who, progress, amended), (), (), (), (), (), 0, 0, 0, 0.0, {})

    @verb
    def update(
        self,
        subject: str,
        target: str,
        *,
        prompt: str | None = None,
        message: str = "",
        method: str | None = None,
        set: Settings = (),
        strict: bool = False,
        all_facts: bool = False,
        force: bool = False,
        workers: Count | None = None,
        on: str | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Committed":
        """Give one active fact another target: one commit that removes the old request and adds the new one.

        Args:
            subject: whose fact.
            target: what the model shall say now.
            prompt: which of the subject's facts, where there are several.
            message: why; by default the fact, its old target and the new one.
        """
        who, settings = self._signing(author, time, message), self._settings(set, method)
        from patchhub.sets.elements import retargeted

        retargeted(
            self.store, subject, target, prompt=prompt
        )  # says that there is no such fact before torch is imported
        from patchhub.porcelain.commit import update

        how = as_written(method=method, settings=settings, strict=strict, workers=workers, on=on)
        with self._heard() as progress:
            options: dict[str, Any] = {"prompt": prompt, "force": force, "all_facts": all_facts}
            return update(self.store, subject, target, who, progress, how, **options)

    @verb
    def revert(
        self,
        rev: str | None = None,
        *,
        subject: str | Sequence[str] = (),
        request: str | Sequence[str] = (),
        message: str = "",
        check: bool = False,
        force: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Changed":
        """Take back what a commit changed, wherever it is in history, as a new commit. No model runs.

        Args:
            rev: the commit; None: facts by ``subject`` or ``request``, whichever commit wrote them.
            subject: only facts about these subjects.
            request: only these facts, by request id or a prefix of one.
            message: why; by default says what was reverted.
        """
        who, names = self._signing(author, time, message), {"subjects": many(subject), "requests": many(request)}
        from patchhub.porcelain.change import revert

        with self._heard() as progress:
            return revert(self.store, rev, who, **names, progress=progress, guarding=guarded_by(force, check))

    @verb
    def cherry_pick(
        self,
        rev: str,
        *,
        on_conflict: Literal["refuse", "replace"] = "refuse",
        message: str = "",
        check: bool = False,
        force: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Changed":
        """Do what a commit changed once more on the current branch, from its recorded columns. No model runs.

        Args:
            on_conflict: when an active fact says otherwise about the same prompt and subject.
            message: why; by default the message of the commit.
        """
        who = self._signing(author, time, message)
        from patchhub.porcelain.change import cherry_pick

        guarding = guarded_by(force, check)
        with self._heard() as progress:
            return cherry_pick(self.store, rev, who, on_conflict=on_conflict, progress=progress, guarding=guarding)

    @verb
    def squash(
        self,
        span: str | Count,
        *,
        message: str = "",
        check: bool = False,
        force: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Squashed":
        """Make one commit of the newest ones. The active facts stay the same, and the weights to 1e-6. No model runs.

        Args:
            span: how many, or ``"FROM..HEAD"``.
            message: why; by default the messages of the squashed commits.
        """
        who = self._signing(author, time, message)
        from patchhub.porcelain.change import squash

        with self._heard() as progress:
            return squash(self.store, str(span), who, progress, guarding=guarded_by(force, check))

    @verb
    def merge(
        self,
        rev: str | None = None,
        *,
        message: str = "",
        ff: bool = True,
        ours: bool = False,
        theirs: bool = False,
        choices: Place | Mapping[str, Any] | None = None,
        refresh: bool = False,
        dry_run: bool = False,
        continue_: bool = False,
        abort: bool = False,
        check: bool = False,
        force: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Merged | Stopped | Prediction | Aborted":
        """Bring what a revision changed into the current branch, fact by fact. No model runs.

        Where the sides answer one prompt differently the merge stops and nothing changes: the result is `Stopped`, and lists both answers.

        Args:
            message: by default "Merge branch 'NAME'".
            ff: move the branch forward where that is all there is to do; False: make a commit even then.
            ours, theirs: decide every contradiction for the current branch, or for the other side.
            choices: decide them one by one: ``{"The mother tongue of Ada is": "theirs", ...}``, or a JSON file of that.
            refresh: then record what the other side brought again on the merged state.
            dry_run: only say what would contradict or weaken what.
            continue_: take up a stopped merge, with ``choices``, ``ours`` or ``theirs``.
            abort: leave a stopped merge.
        """
        from patchhub.porcelain import merge
        from patchhub.sets.merging import resolution_of

        merge.refuse_unclear(rev, continue_, abort, dry_run)
        if abort:
            return merge.abort_merge(self.store)
        decided = choices if choices is None or isinstance(choices, Mapping) else Path(choices)
        resolution = resolution_of(decided, ours=ours, theirs=theirs)
        if dry_run:
            return merge.predict(self.store, str(rev), resolution=resolution)
        who, guarding = self._signing(author, time, message), guarded_by(force, check)
        with self._heard() as progress:
            options: dict[str, Any] = {"resolution": resolution, "progress": progress, "guarding": guarding}
            if rev is None:
                done = merge.continue_merge(self.store, who, **options)
            else:
                done = merge.merge(self.store, rev, who, fast_forward=ff, **options)
            return merge.then_refreshed(self.store, done, who, progress, force=force) if refresh else done

    @verb
    def refresh(
        self, *, message: str = "", force: bool = False, author: str | None = None, time: str | None = None
    ) -> "Refreshed":
        """Record facts again whose recording is stale, and on a merge those that it brought, as a new commit.

        Args:
            message: why; by default says how many facts.
        """
        who, head = self._signing(author, time, message), self.store.head[1]
        from patchhub.sets.elements import due, nothing_due
        from patchhub.sets.merging import refuse_stopped
        from patchhub.sets.shards import stale_shards

        refuse_stopped(self.store)
        if not (due(self.store, head) or stale_shards(self.store, self.store.active(head))):
            raise nothing_due()
        from patchhub.porcelain.commit import refresh

        with self._heard() as progress:
            return refresh(self.store, who, progress, force=force)

    @verb
    def import_(
        self,
        source: Place,
        *,
        message: str | None = None,
        tolerance: Amount = 1e-6,
        base: Place | None = None,
        check: bool = False,
        force: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Imported":
        """Commit the change that a folder makes to the base: a PEFT LoRA adapter, or a fine-tuned checkpoint.

        Args:
            message: what it is; by default where it came from.
            tolerance: relative error up to which a difference of checkpoints is taken as low rank.
        """
        folder = Path(source)
        who = self._signing(author, time, message or f"Import {folder.resolve().name}")
        from patchhub.porcelain.exchange import import_change

        guarding, place = guarded_by(force, check), place_of(base)
        with self._heard() as progress:
            return import_change(self.store, folder, who, progress, tolerance=tolerance, base=place, guarding=guarding)
