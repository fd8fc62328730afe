"""The front door: `Repository`, the product as a class, with a method for every verb of the command line.

Names and options are those of `patchhub VERB`: a dash is an underscore, `--no-x` is ``x=False``, a word that Python keeps for itself ends
with an underscore, and the verbs of a group carry its name (`remote_add`). There is no logic here: a method turns plain arguments into
what porcelain wants. Cheap checks come first, since what is behind them may import torch.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Union

from patchhub.cache import user_folder
from patchhub.progress import Progress
from patchhub.repository.arguments import Amount, Mode, Place, check, in_bytes, listener, place_of, who_of
from patchhub.repository.looking import LookingVerbs
from patchhub.repository.model import ModelVerbs
from patchhub.repository.refs import RefVerbs
from patchhub.repository.writing import WritingVerbs
from patchhub.sets.settings import read_setting
from patchhub.store.store import DIRECTORY, Store, refuse_existing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from patchhub.porcelain.history import Entry, Revision
    from patchhub.porcelain.model import Initialised
    from patchhub.porcelain.share import Cloned

__all__ = ["Repository", "clone", "open"]


def open(folder: Place = ".", *, progress: bool | Progress = True) -> "Repository":
    """The repository of a folder or of the nearest one above it, as git finds its own.

    Args:
        progress: show bars on a terminal and in a notebook; or a listener of one's own.

    Raises:
        RepositoryError: there is none.
    """
    check("folder", folder, Place)
    return Repository._of(Store.discover(Path(folder)), progress)


def clone(
    address: str,
    folder: Place | None = None,
    *,
    base: Place | None = None,
    shared: bool = False,
    trust: bool = False,
    max_size: float = 64.0,
    require_signed: Place | None = None,
    author: str | None = None,
    time: str | None = None,
    progress: bool | Progress = True,
) -> "Repository":
    """A new repository with all that an address has, which it names `origin`. See `Repository.clone`."""
    options: dict[str, Any] = {"trust": trust, "max_size": max_size, "require_signed": require_signed, "shared": shared}
    return Repository.clone(address, folder, base=base, author=author, time=time, progress=progress, **options)


class Repository(WritingVerbs, LookingVerbs, ModelVerbs, RefVerbs):
    """An open repository: the facts that a model was taught, under version control.

    Use it as a context manager, or `close` it. ``repo["HEAD~2"]`` is what a revision holds, ``"v1" in repo`` says whether there is one, and
    iteration goes over the log. One instance serves one thread.

    Attributes:
        store: the store below: objects, refs, operations, configuration.
        progress: who hears of stages and warnings.
        made: what `init` or `clone` found, where one of them made this.
    """

    made: Union["Initialised", "Cloned", None] = None

    def __init__(self, folder: Place = ".", *, progress: bool | Progress = True) -> None:
        """Open the repository in a folder, without looking above it as `patchhub.open` does.

        Args:
            folder: the one that holds the store, or the store itself.
            progress: show bars on a terminal and in a notebook; or a listener of one's own.

        Raises:
            RepositoryError: there is none.
        """
        check("folder", folder, Place)
        path = Path(folder)
        self._hear(Store.open(path.parent if path.name == DIRECTORY else path), progress)

    def _hear(self, store: Store, progress: bool | Progress) -> None:
        self.store, self.progress = store, listener(progress)
        store.cache = store.shared = replace(store.cache, tell=self.progress.warn)
        own = user_folder(os.environ)
        if own is not None:
            store.shared = replace(store.cache, folder=own)

    @classmethod
    def _of(cls, store: Store, progress: bool | Progress) -> "Repository":
        made = cls.__new__(cls)
        made._hear(store, progress)
        return made

    @classmethod
    def init(
        cls,
        folder: Place,
        base: Place,
        *,
        revision: str | None = None,
        experts: Literal["routed", "shared"] | None = None,
        shared: bool = False,
        name: str | None = None,
        author: str | None = None,
        time: str | None = None,
        progress: bool | Progress = True,
    ) -> "Repository":
        """Make a repository in a folder for a base model; reads every byte of the base once.

        Args:
            base: a model folder or a Hub id.
            revision: branch, tag or commit of a model on the Hub.
            experts: of a mixture of experts with a shared expert, which of them facts are written into; None: the routed ones.
            shared: let the group of the folder write in it, whatever the umask of its members.
            name: what a base in a folder is called on the Hub, ``org/model``: adapters and the card name it.

        Raises:
            RepositoryError: there is one already.
            BaseError: the base cannot be read or cannot be edited.
            SettingsError: it has no such experts.
        """
        check("folder", folder, Place)
        check("base", base, Place)
        check("shared", shared, bool)
        who, heard = who_of(author, time), listener(progress)
        refuse_existing(Path(folder))
        if name is not None:
            read_setting("base.name", name)
        from patchhub.porcelain.model import init

        try:
            options: dict[str, Any] = {"revision": revision, "experts": experts, "shared": shared}
            made = init(Path(folder), os.fspath(base), heard, who=who, **options)
        finally:
            heard.close()
        repository = cls(folder, progress=heard)
        repository.made = made
        if name is not None:
            repository.config("base.name", name)
        return repository

    @classmethod
    def clone(
        cls,
        address: str,
        folder: Place | None = None,
        *,
        base: Place | None = None,
        shared: bool = False,
        trust: bool = False,
        max_size: float = 64.0,
        require_signed: Place | None = None,
        author: str | None = None,
        time: str | None = None,
        progress: bool | Progress = True,
    ) -> "Repository":
        """Make a repository with all that an address has, and name that address `origin`.

        Args:
            address: hf://user/repo, a folder, or an address that fsspec knows.
            folder: where it is made; None: in one of this folder, named as the address ends.
            base: the base model; None: where the remote says it is.
            shared: let the group of the folder write in it, whatever the umask of its members.
            trust: accept weights that are not those of their facts, as `fetch` does.
            max_size: most gigabytes to download.
            require_signed: a file of allowed signers: branches and tags that none of them signed are left out.

        Raises:
            RepositoryError: there is a repository already.
            SignatureError: a signature is broken, or the branch that would be the current one is left out.
            RemoteError: nothing there, unreachable, something that the format does not allow, or weights that are not those of their facts.
            BaseError: the base cannot be read, or is not the remote's.
        """
        check("address", address, str)
        check("max_size", max_size, Amount)
        check("trust", trust, bool)
        check("shared", shared, bool)
        who, heard = who_of(author, time), listener(progress)
        path = Path(folder if folder is not None else address.rstrip("/").rpartition("/")[2])
        place = place_of(base)
        if place is not None and Path(place).is_dir():
            from patchhub.models.checkpoint import open_checkpoint

            open_checkpoint(place)  # a folder that holds no base is refused before torch is imported
        from patchhub.porcelain.share import clone

        options: dict[str, Any] = {"base": place, "shared": shared, "max_bytes": in_bytes(max_size)}
        required = None if require_signed is None else Path(require_signed)
        try:
            made = clone(address, path, heard, who=who, trust=trust, require_signed=required, **options)
        finally:
            heard.close()
        repository = cls(path, progress=heard)
        repository.made = made
        return repository

    def close(self) -> None:
        """Close the database; what was read stays."""
        self.store.close()

    def __enter__(self) -> "Repository":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Repository {self.store.root.parent}>"

    def __getitem__(self, rev: str) -> "Revision":
        """What a revision holds; `RevisionError` if there is no such revision."""
        check("rev", rev, str)
        from patchhub.porcelain.history import revision

        return revision(self.store, rev)

    def __contains__(self, rev: object) -> bool:
        from patchhub.errors import RevisionError

        try:
            self.store.resolve(str(rev))
        except RevisionError:
            return False
        return True

    def __iter__(self) -> Iterator["Entry"]:
        return iter(self.log())

    def load(
        self,
        rev: str = "HEAD",
        *,
        base: Place | None = None,
        verify: bool = False,
        prove: bool = False,
        wise: Mode | None = None,
        side_path: bool = False,
        **from_pretrained: Any,
    ) -> "PreTrainedModel":
        """The model at a revision, as an ordinary transformers model; see `patchhub.load`."""
        self._resolve(rev)
        from patchhub.worktree.loading import load

        path = place_of(base)
        options: dict[str, Any] = {"base": path, "verify": verify, "prove": prove, "wise": wise, "side_path": side_path}
        return load(self.store.root, rev, **options, **from_pretrained)

    def attach(
        self,
        model: "PreTrainedModel",
        rev: str = "HEAD",
        *,
        base: Place | None = None,
        prove: bool = False,
        wise: Mode | None = None,
        side_path: bool = False,
    ) -> "PreTrainedModel":
        """Put a model that is in memory into the state of a revision; see `patchhub.attach`."""
        self._resolve(rev)
        from patchhub.worktree.loading import attach

        path = place_of(base)
        return attach(model, self.store.root, rev, base=path, prove=prove, wise=wise, side_path=side_path)
