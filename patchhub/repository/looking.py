"""Verbs that look at history and at facts, that move refs, share them, and keep a store well."""

# No `from __future__ import annotations` here: what a verb takes is checked against its annotations when it is called.

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, overload

from patchhub.errors import RequestError, SettingsError
from patchhub.repository.arguments import (
    Amount,
    Count,
    Opened,
    Place,
    Quantization,
    SigningMethod,
    Source,
    Type,
    in_bytes,
    path,
    place_of,
    verb,
)
from patchhub.results import Rows
from patchhub.who import duration, instant, now

if TYPE_CHECKING:
    from patchhub.porcelain.blame import Bisection, Blame
    from patchhub.porcelain.history import Entry, Shown, Status
    from patchhub.porcelain.refs import Collected, Done, Moved, Named, RefEntry, Stepped, Switched
    from patchhub.porcelain.search import Difference, Found
    from patchhub.porcelain.share import Pulled
    from patchhub.porcelain.trust.audit import Audit
    from patchhub.porcelain.trust.signing import Signed, Verified
    from patchhub.remotes.sync import Fetched, Pushed
    from patchhub.store.fsck import Report
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
            base: where the base model is, if it moved.
            device, dtype, quantization, chat: as in `commit`.
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
            base: where the base model is, if it moved.
            device, dtype, quantization, chat: as in `commit`.
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


class RefVerbs(Opened):
    """Verbs that move refs, share them, and keep a store well; none makes a commit of its own."""

    @overload
    def branch(
        self, name: None = None, rev: None = None, *, remotes: bool = False, all: bool = False
    ) -> "Rows[Named]": ...
    @overload
    def branch(
        self,
        name: str,
        rev: str | None = None,
        *,
        delete: bool = False,
        move: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Moved": ...
    @verb
    def branch(
        self,
        name: str | None = None,
        rev: str | None = None,
        *,
        delete: bool = False,
        move: bool = False,
        remotes: bool = False,
        all: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Moved | Rows[Named]":
        """The branches, or with a name: make that branch at a revision (by default HEAD) without switching to it.

        Args:
            delete: remove the branch; its commits stay in the operation log.
            move: rename: ``branch(old, new, move=True)``, or ``branch(new, move=True)`` for the current one.
            remotes: list the remotes' branches.
            all: list the remotes' branches too.
        """
        from patchhub.porcelain import refs

        if move:
            old, new = (name, rev) if rev is not None else (None, name)
            if new is None or delete:
                raise SettingsError(
                    "a branch is renamed to one name", remedy="Give it: `patchhub branch -m [OLD] NEW`."
                )
            return refs.rename_branch(self.store, old, new, self._who(author, time))
        if delete:
            return refs.delete_branch(self.store, refs.only_name(name, rev), self._who(author, time))
        if name is None:
            here = [] if remotes and not all else refs.branches(self.store)
            return Rows(here + (refs.remote_branches(self.store) if remotes or all else []))
        return refs.create_branch(self.store, name, rev or "HEAD", self._who(author, time))

    @overload
    def tag(self, name: None = None, rev: None = None) -> "Rows[Named]": ...
    @overload
    def tag(
        self,
        name: str,
        rev: str | None = None,
        *,
        delete: bool = False,
        message: str = "",
        sign: bool | None = None,
        key: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Moved": ...
    @verb
    def tag(
        self,
        name: str | None = None,
        rev: str | None = None,
        *,
        delete: bool = False,
        message: str = "",
        sign: bool | None = None,
        key: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Moved | Rows[Named]":
        """The tags, or with a name: make that tag at a revision (by default HEAD), or remove it. Tags do not move.

        Args:
            message: what the tag is for, which is listed in place of its commit's message.
            sign, key: as in `commit`; what is signed is the name with the commit that it leads to.
        """
        from patchhub.porcelain import refs

        if delete:
            return refs.delete_tag(self.store, refs.only_name(name, rev), self._who(author, time))
        if name is None:
            if message:
                raise SettingsError("a message needs a tag", remedy="Name it: `patchhub tag NAME -m TEXT`.")
            return Rows(refs.tags(self.store))
        who = self._signing(author, time, message, sign=sign, key=key)
        return refs.create_tag(self.store, name, rev or "HEAD", who)

    @verb
    def sign(
        self,
        rev: str = "HEAD",
        *,
        with_: SigningMethod | None = None,
        key: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Rows[Signed]":
        """Sign a commit that is there, or each one of ``FROM..TO``.

        Args:
            with_: ssh, or with the extra ``patchhub[signing]`` model-signing, certificate or sigstore; None: the config's, else ssh.
            key: the file of the key; None: the config's.
        """
        from patchhub.porcelain.trust.signing import sign

        return Rows(sign(self.store, rev, self._signing(author, time, sign=True, key=key, method=with_)))

    @verb
    def approve(
        self,
        rev: str = "HEAD",
        *,
        message: str = "",
        with_: SigningMethod | None = None,
        key: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Rows[Signed]":
        """Say with a key of one's own that a commit of somebody else, or each one of ``FROM..TO``, may go on.

        Args:
            message: why.
            with_, key: as in `sign`.
        """
        from patchhub.porcelain.trust.signing import approve

        who = self._signing(author, time, message, sign=True, key=key, method=with_)
        return Rows(approve(self.store, rev, who))

    @verb
    def switch(
        self,
        name: str,
        rev: str | None = None,
        *,
        create: bool = False,
        detach: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Switched":
        """Go to a branch; one that only a remote has is made here first.

        Args:
            create: make the branch first, at a revision (by default HEAD; ``base`` begins anew).
            detach: go to the commit of that name, on no branch.
        """
        from patchhub.porcelain.refs import switch_as

        return switch_as(self.store, name, rev, self._who(author, time), create=create, detached=detach)

    @verb
    def reset(self, rev: str, *, author: str | None = None, time: str | None = None) -> "Moved":
        """Move the current branch to a revision. Nothing is lost: `undo` moves it back."""
        from patchhub.porcelain.refs import reset

        return reset(self.store, rev, self._who(author, time))

    @verb
    def reflog(self, ref: str = "HEAD", *, limit: Count | None = None) -> "Rows[RefEntry]":
        """Where a ref was, the last move first."""
        from patchhub.porcelain.refs import reflog

        return Rows(list(reflog(self.store, ref, limit=limit)))

    @verb
    def undo(
        self, steps: Count = 1, *, all: bool = False, author: str | None = None, time: str | None = None
    ) -> "Stepped":
        """Take back the last commands that changed facts, branches or tags; repeated, walk further back.

        A switch, a fetch, a push and notes of scores stay as they are, unless ``all`` is said.

        Args:
            steps: how many commands.
            all: whatever they did.
        """
        from patchhub.porcelain.refs import undo

        return undo(self.store, who=self._who(author, time), steps=steps, everything=all)

    @verb
    def op_log(self, *, limit: Count | None = None) -> "Rows[Done]":
        """Every operation of this store, the last one first: what was run, by whom, and which refs it moved."""
        from patchhub.porcelain.refs import operations

        return Rows(list(operations(self.store, limit=limit)))

    @verb
    def redo(self, *, author: str | None = None, time: str | None = None) -> "Stepped":
        """Reverse the last `undo`."""
        from patchhub.porcelain.refs import redo

        return redo(self.store, who=self._who(author, time))

    @verb
    def remote_add(self, name: str, address: str) -> str:
        """Give an address a name, `origin` where only one is needed; returns the address as it is kept."""
        from patchhub.porcelain.share import remote_add

        return remote_add(self.store, name, address)

    @verb
    def remote_set_url(self, name: str, address: str) -> str:
        """Give a remote another address; returns the address as it is kept."""
        from patchhub.porcelain.share import remote_set_url

        return remote_set_url(self.store, name, address)

    @verb
    def remote_list(self) -> dict[str, str]:
        """The address of every remote by its name."""
        from patchhub.porcelain.share import remotes

        return remotes(self.store)

    @verb
    def remote_remove(self, name: str, *, author: str | None = None, time: str | None = None) -> None:
        """Forget a remote; nothing is deleted there."""
        from patchhub.porcelain.share import remote_remove

        remote_remove(self.store, name, who=self._who(author, time))

    @verb
    def remote_rename(self, old: str, new: str, *, author: str | None = None, time: str | None = None) -> str:
        """Give a remote another name; returns its address."""
        from patchhub.porcelain.share import remote_rename

        return remote_rename(self.store, old, new, who=self._who(author, time))

    @verb
    def push(
        self,
        remote: str | None = None,
        *refs: str,
        all: bool = False,
        tags: bool = False,
        private_facts: bool | None = None,
        delete: bool = False,
        force_with_lease: bool = False,
        dry_run: bool = False,
        author: str | None = None,
        time: str | None = None,
    ) -> "Rows[Pushed]":
        """Bring branches and tags to a remote; by default the current branch, to the only remote or to `origin`.

        Args:
            all: all branches and tags; they move one after the other.
            tags: all tags.
            private_facts: withhold the texts of the facts, or stop doing so; None: as the remote has it.
            delete: remove the named branches and tags there, where they are as they were at the last fetch or push.
            force_with_lease: overwrite a branch that does not lead to ours, where it is as it was at the last fetch or push.
            dry_run: show what would travel.
        """
        from patchhub.porcelain.share import Chosen, default_remote, push
        from patchhub.remotes.sync import Manner

        who, name = self._who(author, time), remote or default_remote(self.store)
        chosen, manner = Chosen(refs, all, tags, delete), Manner(private_facts, force_with_lease, dry_run)
        with self._heard() as progress:
            return Rows(push(self.store, name, chosen, progress, who=who, manner=manner))

    @verb
    def fetch(
        self,
        remote: str | None = None,
        *,
        trust: bool = False,
        repair: bool = False,
        prune: bool = False,
        max_size: Amount = 64.0,
        require_signed: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Fetched":
        """Bring all branches, tags and notes of a remote here: every byte verified, and weights proven to be those of their facts.

        The branches here stay where they are.

        Args:
            trust: accept weights that are not those of their facts; `fsck` and `show` go on saying so.
            repair: check all that is reachable and fetch again what is damaged here.
            prune: forget branches of the remote that it does not have any more.
            max_size: most gigabytes to download.
            require_signed: a file of allowed signers; branches and tags that none of them signed are left out.
        """
        from patchhub.porcelain.share import default_remote, fetch

        who, name = self._who(author, time), remote or default_remote(self.store)
        options: dict[str, Any] = {"trust": trust, "repair": repair, "prune": prune, "max_bytes": in_bytes(max_size)}
        options["require_signed"] = path(require_signed)
        with self._heard() as progress:
            return fetch(self.store, name, progress, who=who, **options)

    @verb
    def pull(
        self,
        remote: str | None = None,
        *,
        trust: bool = False,
        max_size: Amount = 64.0,
        require_signed: Place | None = None,
        author: str | None = None,
        time: str | None = None,
    ) -> "Pulled":
        """Fetch, then bring the remote's branch of the same name into the current one: fast-forward, or merge.

        Args:
            trust: accept weights that are not those of their facts, as `fetch` does.
            max_size: most gigabytes to download.
            require_signed: a file of allowed signers, one of whom must have signed that branch's commit; else nothing is merged.
        """
        from patchhub.porcelain.share import default_remote, pull

        who, name = self._signing(author, time), remote or default_remote(self.store)
        options: dict[str, Any] = {"max_bytes": in_bytes(max_size), "require_signed": path(require_signed)}
        with self._heard() as progress:
            return pull(self.store, name, progress, who, trust=trust, **options)

    @verb
    def config(self, key: str | None = None, value: Any = None, *, unset: bool = False) -> Any:
        """All settings that differ from their defaults, or one, or set one.

            repo.config("memit.layers", [3, 4, 5])

        Args:
            value: as text, or as a number, a truth value or a list.
            unset: go back to the default.
        """
        from patchhub.porcelain.refs import config

        return config(self.store, key, value, unset=unset)

    @verb
    def fsck(self, *, reindex: bool = False) -> "Report":
        """Check every stored byte, every link between objects, and that weights are those of their facts.

        Args:
            reindex: rebuild the search index from the objects first.
        """
        from patchhub.porcelain.refs import fsck

        with self._heard() as progress:
            return fsck(self.store, progress, rebuild=reindex)

    @verb
    def gc(
        self,
        *,
        dry_run: bool = False,
        grace: str | timedelta = "14 days",
        pack: bool = False,
        time: str | None = None,
    ) -> "Collected":
        """Delete what nothing needs: objects that were never recorded, leftovers of interrupted commands, unused cache.

        Args:
            dry_run: say what would be deleted; delete nothing.
            grace: keep what is younger: ``"36 hours"``, ``"2w"``, ``"0"``.
            pack: put objects that are files of their own into packs: a few files in place of five for each commit.
        """
        from patchhub.porcelain.refs import collect

        age = grace if isinstance(grace, timedelta) else duration(grace)
        return collect(self.store, now=self._who(None, time).time, grace=age, dry_run=dry_run, pack=pack)
