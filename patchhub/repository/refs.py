"""Verbs that move refs, share them, and keep a store well."""

# No `from __future__ import annotations` here: what a verb takes is checked against its annotations when it is called.

from datetime import timedelta
from typing import TYPE_CHECKING, Any, overload

from patchhub.errors import SettingsError
from patchhub.repository.arguments import (
    Amount,
    Count,
    Opened,
    Place,
    SigningMethod,
    in_bytes,
    path,
    verb,
)
from patchhub.results import Rows
from patchhub.who import duration

if TYPE_CHECKING:
    from patchhub.porcelain.refs import Collected, Done, Moved, Named, RefEntry, Stepped, Switched
    from patchhub.porcelain.share import Pulled
    from patchhub.porcelain.trust.signing import Signed
    from patchhub.remotes.receive import Fetched
    from patchhub.remotes.sync import Pushed
    from patchhub.store.fsck import Report


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
            key: the setting's name; None: all of them.
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
