"""A remote on the Hugging Face Hub: a branch or tag is a branch or tag there, its tree holds all that its commit needs.

A push is one commit of the Hub per ref, guarded by the parent that was seen. A ref that is new is made on a staging
branch first and appears when it is complete. When an answer is lost, the head is read again; nothing is sent twice.

What a page on the Hub says about a commit, its card, stands between two markers; the rest of a card is its owner's, and stays as it is when
a push writes the card anew. In the front matter the fields of `_OURS` are written here, and tags are joined; other
fields are the owner's."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from patchhub.canonical import one_line
from patchhub.errors import RemoteError
from patchhub.fsio import Span, os_errors
from patchhub.objects import Request
from patchhub.remotes.hub_files import TRANSIENT, HubFiles, HubRefs, Sleep, explained, status_of, write_call
from patchhub.remotes.parcels import Contents, object_path, wrapped
from patchhub.remotes.remote import NAME, BranchManifest, Heard, Publication, RemoteMovedError, Tip, View, unheard
from patchhub.store.object_store import INDEX, PACK, pack_path
from patchhub.store.revisions import BRANCHES, TAGS

BEGIN: Final = "<!-- patchhub:begin (what stands between these two lines is written anew by each push) -->"
END: Final = "<!-- patchhub:end -->"
_OURS: Final = frozenset(
    {"base_model", "base_model_relation", "library_name", "license", "model-index", "pipeline_tag", "tags"}
)
_FRONT = re.compile(r"\A---\n(.*?)\n?---[ \t]*(?:\n|\Z)", re.DOTALL)
_BETWEEN = re.compile(r"<!-- patchhub:begin.*?-->.*<!-- patchhub:end -->", re.DOTALL)
_SIGNATURE: Final = "Made with patchhub. Edited facts can be read from the weights"
_ROWS: Final = 100
_TAGS: Final = ("patchhub", "knowledge-editing", "model-editing")


@dataclass(frozen=True)
class AdapterNote:
    """The adapter at the root of the repository: its rank, its relative error, and which servers take it.

    Attributes:
        every_layer: it has factors in the layers that do not change too.
        vllm: vLLM serves adapters of this family.
        llama_cpp: llama.cpp knows this family, so `export gguf` can write the adapter.
    """

    rank: int
    error: float
    every_layer: bool = True
    vllm: bool = True
    llama_cpp: bool = True


@dataclass(frozen=True)
class ScoreLine:
    """One score of a note.

    Attributes:
        suite: whose score, and on what.
        interval: its 95 % interval, if it has one.
        base: the same of the unpatched model, if it was measured.
        meaning: its definition in a line.
    """

    suite: str
    name: str
    value: float
    interval: tuple[float, float] | None
    base: float | None
    meaning: str


@dataclass(frozen=True)
class Card:
    """What the card is made of.

    Attributes:
        repo: ``user/name`` on the Hub.
        commit: id of the commit.
        message, author, time: of the commit.
        base: id of the base object.
        base_model, base_revision: where the base is on the Hub, if it is.
        requests: the active facts; None if their texts are withheld.
        active: how many facts are active.
        methods: the editors that wrote them.
        adapter: what lies at the root, or in words why nothing does.
        changes: relative norm of each weight's change.
        scores: of the notes about the commit.
        title: what the card is called; None: as the repository is.
        license: an identifier that the Hub knows, such as ``apache-2.0``; None: the owner's card says it, or nobody.
    """

    repo: str
    commit: str
    message: str
    author: str
    time: str
    base: str
    base_model: str | None
    base_revision: str | None
    requests: Sequence[Request] | None
    active: int
    methods: Sequence[str]
    adapter: AdapterNote | str
    changes: Mapping[str, float]
    scores: Sequence[ScoreLine]
    title: str | None = None
    license: str | None = None


def write_card(card: Card) -> bytes:
    """``README.md``: the same card always gives the same bytes."""
    parts = [_introduction(card), _facts(card), _scores(card), _loading(card), _about(card)]
    body = "\n\n".join(part for part in parts if part)
    return f"{_front_matter(_fields(card))}\n{BEGIN}\n{body}\n{END}\n".encode()


def kept(before: bytes, card: bytes) -> bytes:
    """A new card with what its owner wrote in the one that is there: text outside the markers, and fields that are not written here."""
    try:
        old, new = before.decode("utf-8").replace("\r\n", "\n"), card.decode("utf-8")
    except UnicodeDecodeError:
        return card
    if _BETWEEN.search(new) is None:
        return card
    (theirs, text), (ours, body) = _parted(old), _parted(new)
    tags = (
        [tag for tag in theirs.get("tags") or [] if isinstance(tag, str)]
        if isinstance(theirs.get("tags"), list)
        else []
    )
    others = {name: value for name, value in theirs.items() if name not in _OURS or name == "license"}
    fields = {**ours, **{name: value for name, value in others.items() if name not in ours}}
    fields["tags"] = list(dict.fromkeys([*ours["tags"], *tags]))
    if _BETWEEN.search(text):
        text = _BETWEEN.sub(lambda found: body.strip(), text, count=1)
    elif not text.strip() or _SIGNATURE in text:
        text = body
    else:
        text = f"{text.strip()}\n\n{body}"
    return f"{_front_matter(fields)}\n{text.strip()}\n".encode()


def _parted(text: str) -> tuple[dict[str, Any], str]:
    """The front matter's fields, none where it is no mapping, and the text below it."""
    import yaml  # here: only a push to the Hub reads a card

    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        fields = None
    return {str(name): value for name, value in fields.items()} if isinstance(fields, dict) else {}, text[found.end() :]


def adapter_name(repo: str, commit: str) -> str:
    """A name for the adapter that is never used for another content, so that no server serves a stale cache."""
    return f"{repo.rpartition('/')[2]}-{commit[:12]}"


def _fields(card: Card) -> dict[str, Any]:
    has_adapter = isinstance(card.adapter, AdapterNote)
    fields: dict[str, Any] = {
        "library_name": "peft" if has_adapter else "patchhub",
        "pipeline_tag": "text-generation",
        "tags": [*_TAGS, *card.methods, *(["lora"] if has_adapter else [])],
    }
    if card.base_model is not None:
        fields = {"base_model": card.base_model, "base_model_relation": "adapter", **fields}
    if card.license is not None:
        fields["license"] = card.license
    if card.scores:
        fields["model-index"] = [{"name": _title(card), "results": list(_results(card.scores))}]
    return fields


def _results(scores: Sequence[ScoreLine]) -> Iterator[dict[str, Any]]:
    """Scores as the Hub lists evaluation results: a result for each suite, with a metric for each score."""
    for suite in dict.fromkeys(line.suite for line in scores):
        metrics = [
            {"type": line.name, "name": line.name, "value": line.value} for line in scores if line.suite == suite
        ]
        yield {"task": {"type": "text-generation"}, "dataset": {"name": suite, "type": suite}, "metrics": metrics}


def _title(card: Card) -> str:
    return card.title or card.repo.rpartition("/")[2]


def _front_matter(fields: Mapping[str, Any]) -> str:
    lines = [f"{name}: {json.dumps(value, default=str)}" for name, value in fields.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _introduction(card: Card) -> str:
    base = f"`{card.base_model}`" if card.base_model else f"a base model (fingerprint `{card.base[:12]}`)"
    at = f" at `{card.base_revision[:12]}`" if card.base_revision else ""
    methods = " and ".join(_cell(method.upper()) for method in card.methods)
    how = f" by {methods}" if methods else ""
    return (
        f"# {_cell(_title(card))}\n\n"
        f"{card.active} facts written into {base}{at}{how}. "
        f"The base is unchanged; this repository holds the change, with its history.\n\n"
        f"Commit `{card.commit[:12]}`, {card.time[:10]}: {_cell(card.message.partition(chr(10))[0])}"
    )


def _facts(card: Card) -> str:
    if card.requests is None:
        return "## Facts\n\nThe texts of the facts are withheld by the author."
    if not card.requests:
        return ""
    rows = [
        f"| {_cell(request.text)} | {_cell(request.target_true or '')} | **{_cell(request.target_new)}** |"
        for request in card.requests[:_ROWS]
    ]
    more = len(card.requests) - len(rows)
    rest = f"\n\n... and {more} more." if more else ""
    return "## Facts\n\n| prompt | before | now |\n|---|---|---|\n" + "\n".join(rows) + rest


def _scores(card: Card) -> str:
    if not card.scores:
        return ""
    rows = [
        f"| {_cell(line.name)} | {line.value:.4g} | {'' if line.interval is None else '{:.3g} to {:.3g}'.format(*line.interval)} "
        f"| {'' if line.base is None else f'{line.base:.4g}'} | {_cell(line.meaning)} | {_cell(line.suite)} |"
        for line in card.scores
    ]
    head = "| score | value | 95 % interval | base | meaning | measured on |\n|---|---|---|---|---|---|\n"
    return "## Scores\n\n" + head + "\n".join(rows)


def _loading(card: Card) -> str:
    parts = [
        "## Use",
        f'With patchhub, checked against the base:\n\n    import patchhub\n    model = patchhub.load("{card.repo}")',
        "That the weights are those of the facts is their author's claim (`model.patchhub.proof`). To check it, which downloads what the "
        f'facts were recorded as:\n\n    model = patchhub.load("{card.repo}", prove=True)',
    ]
    if isinstance(card.adapter, AdapterNote):
        base = card.base_model or "BASE"
        name = adapter_name(card.repo, card.commit)
        exact = "exact" if card.adapter.error <= 1e-6 else f"approximate, relative error {card.adapter.error:.1e}"
        parts.append(
            f"With PEFT (rank {card.adapter.rank}, {exact}; float32 bases give the same logits, other types round):\n\n"
            "    from peft import PeftModel\n"
            "    from transformers import AutoModelForCausalLM\n"
            f'    base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            f'    model = PeftModel.from_pretrained(base, "{card.repo}", adapter_name="{name}")'
        )
        parts.extend(_servers(card, card.adapter, base, name))
    else:
        parts.append(f"There is no PEFT adapter here: {card.adapter}. {_fused(card)}")
    return "\n\n".join(parts)


def _servers(card: Card, adapter: AdapterNote, base: str, name: str) -> Iterator[str]:
    """The commands that are true for this family."""
    if adapter.vllm:
        few = (
            ""
            if adapter.every_layer
            else (
                " Servers that expect factors in every layer (TGI, LoRAX) need what `patchhub export peft --every-layer` writes."
            )
        )
        yield (
            f"With a server, under a name that changes with the content.{few}\n\n"
            f"    vllm serve {base} --enable-lora --max-lora-rank {adapter.rank} --lora-modules {name}={card.repo}"
        )
    else:
        yield f"vLLM serves no adapters of this family. {_fused(card)}"
    if adapter.llama_cpp:
        yield (
            "With llama.cpp, on any GGUF of the base:\n\n"
            f"    patchhub clone hf://{card.repo} facts && cd facts && patchhub export gguf {card.commit[:12]} --out ../adapter\n"
            f"    llama-server -m BASE.gguf --lora ../adapter/{adapter_name('adapter', card.commit)}.gguf"
        )


def _fused(card: Card) -> str:
    return (
        "The whole model, an ordinary checkpoint for any server that knows the base:\n\n"
        f"    patchhub clone hf://{card.repo} facts && cd facts && patchhub apply {card.commit[:12]} --out ../patched"
    )


def _about(card: Card) -> str:
    rows = [f"| `{weight}` | {change:.2%} |" for weight, change in sorted(card.changes.items())]
    table = "| weight | norm of the change / of the weight |\n|---|---|\n" + "\n".join(rows) if rows else ""
    return (
        f"## About this state\n\n- commit `{card.commit}`\n- base `{card.base}`\n- author {_cell(card.author)}\n\n"
        f"{table}\n\n{_SIGNATURE}; edits are not a way to hide or to "
        "delete knowledge."
    )


def _cell(text: str) -> str:
    """Text that stays inside a table cell and is no markup."""
    line = one_line(" ".join(text.split()))
    for character in "\\`*_[]<>|&":
        line = line.replace(character, f"\\{character}")
    return line


STAGING: Final = "patchhub-staging/"
"""Branches on which new refs are made; never read, and left behind only when a push is cut short."""

CARD: Final = "README.md"
_LARGEST_CARD: Final = 1 << 20  # bytes of a card that is read; a larger one is written anew
_MARK: Final = "patchhub commit "
_MOVED: Final = "Run `patchhub pull`, then push again."


class HubRemote:
    """A model repository of the Hub."""

    def __init__(
        self, repo: str, *, endpoint: str | None = None, token: str | None = None, sleep: Sleep = time.sleep
    ) -> None:
        """`repo` is ``user/name``; endpoint and token are huggingface_hub's own where None."""
        from huggingface_hub import HfApi

        self._api: Any = HfApi(endpoint=endpoint, token=token)
        self._repo = repo
        self._files = HubFiles(repo, self._api, sleep=sleep)
        self._sleep = sleep
        self._damaged: Sequence[str] = ()

    @property
    def address(self) -> str:
        return self._files.place

    def view(self) -> View:
        refs = self._files.refs()
        tips: dict[str, Tip] = {}
        manifests: dict[str, BranchManifest] = {}
        skipped: dict[str, str] = {}
        empty = set()
        for ref, sha in _named(refs).items():
            try:
                manifest = self._manifest(sha)
            except RemoteError as error:
                if error.facts.get("place") is None:  # not what it says, but that it cannot be had
                    raise
                skipped[ref] = error.message
                continue
            if manifest is not None:
                tips[ref], manifests[ref] = Tip(manifest.commit, sha), manifest
            elif ref.startswith(BRANCHES):
                empty.add(ref)
        source = next((manifest.source for manifest in manifests.values()), None)
        for ref, manifest in manifests.items():
            if source is not None and manifest.base != source.base:
                skipped[ref] = f"it is about another base ({manifest.base[:12]})"
                del tips[ref]
        notes = {key: note for manifest in manifests.values() for key, note in manifest.notes.items()}
        private = frozenset(ref for ref, manifest in manifests.items() if manifest.private_facts)
        return View(source, tips, notes, private, frozenset(empty), skipped)

    def sizes(self, tip: Tip) -> Mapping[str, int]:
        return self._read(tip).sizes

    @property
    def damaged(self) -> Sequence[str]:
        return self._damaged

    def alone(self, tip: Tip) -> Collection[str]:
        return self._read(tip).alone

    def _read(self, tip: Tip) -> Contents:
        found = self._files.contents(tip.token)
        self._damaged = found.damaged
        return found

    def read(self, tip: Tip, ids: Collection[str], into: Path, heard: Heard = unheard) -> Iterator[tuple[str, Span]]:
        return self._files.read_objects(tip.token, ids, into, heard)

    def publish(self, publication: Publication, heard: Heard = unheard) -> None:
        """``heard`` is called once, at the end: while it sends, the Hub's client has bars of its own."""
        refs = self._files.refs()
        if refs is None:
            self._create_repository()
            refs = self._files.refs() or HubRefs({}, {})
        found = _named(refs).get(publication.ref)
        if publication.expected is not None:
            self._commit(publication.ref[len(BRANCHES) :], publication.expected.token, publication)
        elif found is None:
            self._create(publication)
        elif publication.ref.startswith(TAGS) or self._manifest(found) is not None:
            raise self._moved(publication)
        else:
            self._commit(publication.ref[len(BRANCHES) :], found, publication)
        heard(publication.size)

    # --- writing ----------------------------------------------------------------------------------------------------

    def remove(self, ref: str, expected: Tip) -> None:
        found = _named(self._files.refs()).get(ref)
        if found != expected.token:
            raise RemoteMovedError(
                f"{ref} of {self.address} was moved by someone else",
                remedy="Run `patchhub fetch`, then look again.",
                ref=ref,
            )
        try:
            if ref.startswith(TAGS):
                take = partial(self._api.delete_tag, self._repo, tag=ref[len(TAGS) :])
            else:
                take = partial(self._api.delete_branch, self._repo, branch=ref[len(BRANCHES) :])
            write_call(take, sleep=self._sleep)
        except Exception as error:  # the client raises errors of several libraries
            raise explained(self.address, error) from error

    def _create_repository(self) -> None:
        try:
            write_call(lambda: self._api.create_repo(self._repo, private=True, exist_ok=True), sleep=self._sleep)
        except Exception as error:  # the client raises errors of several libraries
            if self._files.refs() is None:
                raise explained(self.address, error) from error

    def _commit(self, branch: str, parent: str, publication: Publication) -> str:
        """One commit on a branch of the Hub whose head must be `parent`; returns its name there."""
        with TemporaryDirectory(prefix="patchhub-") as name:
            files, gone = self._objects(parent, publication, Path(name))
            try:
                made = write_call(
                    lambda: self._api.create_commit(
                        self._repo,
                        self._operations(parent, publication, files, gone),
                        commit_message=publication.message,
                        commit_description=_MARK + publication.commit,
                        revision=branch,
                        parent_commit=parent,
                    ),
                    sleep=self._sleep,
                )
            except Exception as error:  # the client raises errors of several libraries
                return self._resolve(branch, parent, publication, error)
        return str(made.oid)

    def _objects(self, parent: str, publication: Publication, into: Path) -> tuple[dict[str, bytes | str], list[str]]:
        """What is sent of objects, by path, and what is deleted. Packs are written into a folder first."""
        alone, parcels = wrapped(publication.groups)
        contents = self._files.contents(parent)
        again, gone = contents.without(publication.withdrawn, lambda name: self._files.pack(parent, name, into))
        files: dict[str, bytes | str] = {
            object_path(identity): place.read() if place.path.suffix == PACK else str(place.path)
            for identity, place in alone.items()
        }
        gathered = wrapped(publication.gathered)[1]
        gone += [object_path(identity) for parcel in gathered for identity, _ in parcel.objects]
        for parcel in (*parcels, *again, *gathered):
            file = into / f"{parcel.index.name}{PACK}"
            with os_errors(file), file.open("wb") as stream:
                stream.writelines(parcel.content())
            files[pack_path(parcel.index.name, PACK)] = str(file)
            files[pack_path(parcel.index.name, INDEX)] = parcel.index.data
        return files, [path for path in gone if path not in files]

    def _resolve(self, branch: str, parent: str, publication: Publication, error: Exception) -> str:
        """After a failure: what really happened. The name of our commit if it landed, else the right error."""
        status = status_of(error)
        if status is not None and status != 412 and status not in TRANSIENT:
            raise explained(self.address, error) from error
        newer = self._newer(branch, parent)
        landed = next((sha for sha, text in newer if _MARK + publication.commit in text), None)
        if landed is not None:
            return landed
        if status == 412 or newer:
            raise self._moved(publication) from error
        cause = explained(self.address, error)
        raise RemoteError(
            f"the push of {branch} did not land: {cause.message}",
            remedy=f"{cause.remedy} What has arrived is not sent twice.",
            **cause.facts,
        ) from error

    def _newer(self, branch: str, parent: str) -> list[tuple[str, str]]:
        """(name, description) of the Hub's commits on a branch after `parent`."""
        listed = self._files.call(lambda: list(self._api.list_repo_commits(self._repo, revision=branch)))
        names = [commit.commit_id for commit in listed]
        new = listed[: names.index(parent)] if parent in names else listed
        return [(commit.commit_id, commit.message) for commit in new]

    def _operations(
        self, parent: str, publication: Publication, objects: Mapping[str, bytes | str], withdrawn: Collection[str]
    ) -> list[Any]:
        """What the commit changes; made anew for each attempt, since the client marks them."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        before = self._manifest(parent)
        source = publication.source
        manifest = BranchManifest(
            base=source.base,
            base_model=source.model,
            base_revision=source.revision,
            commit=publication.commit,
            notes={**(before.notes if before else {}), **publication.notes},
            private_facts=publication.private_facts,
        )
        files: dict[str, bytes | str] = {**objects, NAME: manifest.to_json()}
        there = self._files.tree(parent)
        files |= {path: self._page(parent, path, data) for path, data in publication.pages.items() if data is not None}
        unwanted = [path for path, data in publication.pages.items() if data is None]
        gone = [path for path in (*unwanted, *withdrawn) if path in there]
        return [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in files.items()),
            *(CommitOperationDelete(path_in_repo=path) for path in gone),
        ]

    def _page(self, parent: str, path: str, data: bytes) -> bytes:
        """A page as it shall be: of the card that is there, what its owner wrote stays."""
        if path != CARD or path not in self._files.tree(parent):
            return data
        with TemporaryDirectory(prefix="patchhub-") as folder:
            before = self._files.download(parent, path, Path(folder))
            return kept(before.read_bytes(), data) if before.stat().st_size <= _LARGEST_CARD else data

    def _create(self, publication: Publication) -> None:
        """Make a new branch or tag, complete from its first moment."""
        near = publication.near
        changes = publication.groups or publication.notes or publication.withdrawn
        if near is not None and near.commit == publication.commit and not changes:
            self._create_ref(publication, near.token)
            return
        start = near.token if near is not None else self._first_commit()
        staging = STAGING + secrets.token_hex(8)
        self._files.call(lambda: self._api.create_branch(self._repo, branch=staging, revision=start, exist_ok=True))
        try:
            self._create_ref(publication, self._commit(staging, start, publication))
        finally:
            with contextlib.suppress(Exception):  # what is left behind is never read
                self._api.delete_branch(self._repo, branch=staging)

    def _create_ref(self, publication: Publication, sha: str) -> None:
        ref = publication.ref
        try:
            if ref.startswith(TAGS):
                make = partial(self._api.create_tag, self._repo, tag=ref[len(TAGS) :], revision=sha)
            else:
                make = partial(self._api.create_branch, self._repo, branch=ref[len(BRANCHES) :], revision=sha)
            write_call(make, sleep=self._sleep)
        except Exception as error:  # the client raises errors of several libraries
            found = _named(self._files.refs()).get(ref)
            if found is None:
                raise explained(self.address, error) from error
            manifest = self._manifest(found)
            if manifest is None or manifest.commit != publication.commit:
                raise self._moved(publication) from error

    def _first_commit(self) -> str:
        """The oldest commit of the repository, which holds nothing of patchhub."""
        listed = self._files.call(lambda: list(self._api.list_repo_commits(self._repo)))
        return str(listed[-1].commit_id)

    def _manifest(self, sha: str) -> BranchManifest | None:
        with TemporaryDirectory(prefix="patchhub-") as folder:
            return self._files.manifest(sha, Path(folder))

    def _moved(self, publication: Publication) -> RemoteMovedError:
        name = publication.ref.removeprefix(BRANCHES).removeprefix(TAGS)
        now = self.view().tips.get(publication.ref)
        place = f"at {now.commit[:12]}" if now else "not there"
        return RemoteMovedError(
            f"{name} of {self.address} was moved by someone else; it is {place} now",
            remedy=_MOVED,
            ref=publication.ref,
            now=now.commit if now else None,
        )


def _named(refs: HubRefs | None) -> dict[str, str]:
    """Full ref names; staging branches and the Hub's own refs are left out."""
    if refs is None:
        return {}
    branches = {BRANCHES + name: sha for name, sha in sorted(refs.branches.items()) if not name.startswith(STAGING)}
    return {**branches, **{TAGS + name: sha for name, sha in sorted(refs.tags.items())}}
