"""Revision names: their grammar, what they resolve to, and which names a branch or tag may have. Pure.

    name     = "HEAD" | "@" | branch | tag | "refs/..." | remote "/" branch | hex prefix (4 to 64 digits) | "base"
    revision = (name | name? "@{" n "}") ("~" n? | "^" n?)*

`X@{n}` is where X was n operations ago, whatever those operations changed; without a name X is HEAD."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from patchhub.canonical import UNSEEN
from patchhub.errors import RevisionError

HEAD: Final = "HEAD"
BASE: Final = "base"
SYMBOLIC: Final = "ref: "
BRANCHES: Final = "refs/heads/"
TAGS: Final = "refs/tags/"
REMOTES: Final = "refs/remotes/"
NOTES: Final = "refs/notes/"
SIGNATURES: Final = "signature/"
TAG_MESSAGES: Final = "tag/"
"""How the suite of a note begins that keeps a signature."""

_REVISION = re.compile(r"(?P<name>.*?)(?:@\{(?P<ago>\d{1,9})\})?(?P<steps>(?:[~^]\d{0,9})*)", re.DOTALL)
_STEP = re.compile(r"([~^])(\d*)")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_ID = re.compile(r"[0-9a-f]{64}")
_HUB_COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_NAME: Final = 200
"""Characters of the longest name: more cannot be shown, nor be a file's name everywhere."""

_FORBIDDEN_IN_NAME = re.compile(rf"[{UNSEEN}\x20~^:?*\[\\]|\.\.|@\{{|//|/\.|\.lock(/|$)")


class View(Protocol):
    """What resolving a name needs to know about a store."""

    def refs(self, ago: int = 0) -> Mapping[str, str]:
        """Every ref and its target, `ago` operations before now; empty before the first."""
        ...

    def commits(self, prefix: str) -> Sequence[str]:
        """Ids of the commits that begin with `prefix`; a few are enough where there are many."""
        ...

    def parents(self, commit: str) -> Sequence[str]:
        """Parents of a commit, the first one first."""
        ...


def resolve(revision: str, view: View) -> str | None:
    """The id of the commit that `revision` names; None for the unpatched model (`base`, or HEAD before any commit).

    Raises:
        RevisionError: nothing, or more than one thing, has that name.
    """
    match = _REVISION.fullmatch(revision)
    if match is None or not (match["name"] or match["ago"]):
        raise RevisionError(
            f"{revision!r} is not a revision name", remedy="Write a branch, a tag, a commit id, HEAD or `base`."
        )
    name, ago = match["name"] or HEAD, match["ago"]
    name = HEAD if name == "@" else name
    commit = _resolve_name(name, view) if ago is None else _resolve_earlier(name, int(ago), view)
    for sign, count in _STEP.findall(match["steps"]):
        follow_step = _nth_ancestor if sign == "~" else _nth_parent
        commit = follow_step(commit, int(count or 1), revision, view)
    return commit


def resolve_ref(name: str, refs: Mapping[str, str]) -> str | None:
    """The full name of the ref that a short name stands for: `refs/...` itself, then tag, branch, remote branch.

    Raises:
        RevisionError: a tag and a branch share the name.
    """
    if name == HEAD or name.startswith("refs/"):
        return name if name in refs else None
    found = [prefix + name for prefix in (TAGS, BRANCHES, REMOTES) if prefix + name in refs]
    if len(found) > 1:
        raise RevisionError(
            f"{name!r} is ambiguous: {' and '.join(found)}", remedy=f"Write {found[0]} or {found[1]}.", candidates=found
        )
    return found[0] if found else None


def follow(ref: str, refs: Mapping[str, str]) -> str | None:
    """The id that a ref leads to, through ``ref: ...``; None for a branch without a commit."""
    target = refs.get(ref)
    if target is not None and target.startswith(SYMBOLIC):
        return refs.get(target[len(SYMBOLIC) :])
    return target


def check_ref(ref: str) -> None:
    """Refuse a full ref name that could not be written as a revision or as a branch or tag on the Hub.

    Raises:
        RevisionError: the name is outside the known namespaces or has characters with another meaning.
    """
    if ref == HEAD:
        return
    namespace = next((prefix for prefix in (BRANCHES, TAGS, REMOTES, NOTES) if ref.startswith(prefix)), None)
    name = ref[len(namespace) :] if namespace else ""
    if namespace is not None and not name:
        raise RevisionError("a branch or tag needs a name", remedy="Give one of letters, digits and `-`.", name=name)
    if namespace is None:
        raise RevisionError(f"{ref!r} is not a ref", remedy="Refs are HEAD, refs/heads/*, tags/*, remotes/*, notes/*.")
    reserved = name in (HEAD, BASE) or name.startswith("refs/") or (namespace != NOTES and _looks_like_id(name))
    if reserved or name[0] in "-./" or name[-1] in "./" or name == "@" or _FORBIDDEN_IN_NAME.search(name):
        raise RevisionError(
            f"{name!r} cannot be the name of a branch or tag",
            remedy="Use letters, digits, `-`, `_`, `.` and single `/`, not an id, `HEAD` or `base`.",
            name=name,
        )
    if len(name) > MAX_NAME:
        raise RevisionError(
            f"{name[:30]!r}... of {len(name)} characters is too long for a name",
            remedy=f"Use at most {MAX_NAME} characters.",
            length=len(name),
        )


def twins(refs: Iterable[str]) -> tuple[str, str] | None:
    """Two refs whose names differ in the case of letters alone, as `main` and `MAIN`, if there are any."""
    seen: dict[str, str] = {}
    for ref in sorted(refs):
        other = seen.setdefault(unicodedata.normalize("NFKC", ref).casefold(), ref)
        if other != ref:
            return other, ref
    return None


def check_target(ref: str, target: str) -> None:
    """Refuse what a ref cannot lead to: anything but an id, or for HEAD also ``ref: refs/heads/...``."""
    branch = target[len(SYMBOLIC) :] if target.startswith(SYMBOLIC) else None
    if branch is not None and ref == HEAD and branch.startswith(BRANCHES):
        check_ref(branch)
    elif _ID.fullmatch(target) is None:
        raise RevisionError(
            f"{ref} cannot lead to {target!r}", remedy="Name an object by its id of 64 digits.", ref=ref
        )


def _looks_like_id(name: str) -> bool:
    return len(name) in (40, 64) and _PREFIX.fullmatch(name) is not None


def _resolve_name(name: str, view: View) -> str | None:
    if name == BASE:
        return None
    refs = view.refs()
    ref = resolve_ref(name, refs)
    if ref is not None:
        return follow(ref, refs)
    return _resolve_prefix(name, refs, view)


def _resolve_prefix(name: str, refs: Mapping[str, str], view: View) -> str:
    if _HUB_COMMIT.fullmatch(name):
        raise RevisionError(
            f"{name} names a commit of the Hub, not of this store",
            remedy="Pull it first, then use its branch, its tag or its patchhub id of 64 digits.",
            name=name,
        )
    found = sorted(view.commits(name)) if _PREFIX.fullmatch(name) else []
    if not found:
        raise _unknown(name, refs)
    if len(found) > 1:
        raise RevisionError(
            f"{name!r} is ambiguous: {', '.join(commit[:12] for commit in found[:5])}",
            remedy="Write more digits of the id.",
            candidates=found,
        )
    return found[0]


def _unknown(name: str, refs: Mapping[str, str]) -> RevisionError:
    """The error for a name that nothing has, with what was perhaps meant."""
    if ".." in name:
        ends = "`patchhub log` and `patchhub diff` take one"
        return RevisionError(
            f"{name!r} is a range of commits, and one commit is meant here",
            remedy=f"{ends}; name one of its commits.",
            name=name,
            close=[],
        )
    known = [HEAD, BASE, *(_short(ref) for ref in refs if ref != HEAD and not ref.startswith(NOTES))]
    close = difflib.get_close_matches(name, sorted(known), n=3)
    remedy = (
        f"Did you mean {' or '.join(close)}?" if close else "`patchhub log` and `patchhub branch` list what there is."
    )
    if re.fullmatch(r"[0-9a-f]{1,3}", name) and not close:
        remedy = "Write at least 4 digits of a commit's id."
    return RevisionError(f"nothing is named {name!r}", remedy=remedy, name=name, close=close)


def _short(ref: str) -> str:
    return next((ref[len(prefix) :] for prefix in (BRANCHES, TAGS, REMOTES) if ref.startswith(prefix)), ref)


def _resolve_earlier(name: str, ago: int, view: View) -> str | None:
    """What ref `name` led to `ago` operations before now."""
    refs = view.refs()
    ref = resolve_ref(name, refs)
    if ref is None:
        raise _unknown(name, refs)
    earlier = view.refs(ago)
    if ref not in earlier:
        raise RevisionError(
            f"{name} did not exist {ago} operations ago",
            remedy="`patchhub reflog` lists what there was.",
            name=name,
            ago=ago,
        )
    return follow(ref, earlier)


def _nth_parent(commit: str | None, number: int, revision: str, view: View) -> str | None:
    """``X^n``: parent n of X, counted from 1; ``X^0`` is X."""
    if number == 0:
        return commit
    parents = () if commit is None else view.parents(commit)
    if number > len(parents):
        raise RevisionError(
            f"{revision!r} goes beyond the first commit, or to a parent that is not there",
            remedy="Use `base` for the unpatched model.",
            revision=revision,
        )
    return parents[number - 1]


def _nth_ancestor(commit: str | None, steps: int, revision: str, view: View) -> str | None:
    """``X~n``: n first parents back."""
    for _ in range(steps):
        commit = _nth_parent(commit, 1, revision, view)
    return commit
