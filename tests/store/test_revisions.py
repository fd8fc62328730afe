"""Revision names: each form, each way to be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.errors import RevisionError
from patchhub.store.revisions import check_ref, check_target, follow, resolve

A, B, C, D, E = ("abcd1" + "0" * 59, "abcd2" + "0" * 59, "c" * 64, "d" * 64, "e" * 64)


@dataclass(frozen=True)
class FakeView:
    """a <- b <- d, a <- c, e merges d and c; the views are listed from now backwards."""

    views: tuple[Mapping[str, str], ...]
    history: Mapping[str, Sequence[str]]

    def refs(self, ago: int = 0) -> Mapping[str, str]:
        return self.views[ago] if ago < len(self.views) else {}

    def commits(self, prefix: str) -> Sequence[str]:
        return [commit for commit in self.history if commit.startswith(prefix)]

    def parents(self, commit: str) -> Sequence[str]:
        return self.history[commit]


REFS = {
    "HEAD": "ref: refs/heads/main",
    "refs/heads/main": E,
    "refs/heads/beef": C,
    "refs/heads/both": C,
    "refs/tags/both": D,
    "refs/tags/v1.0": B,
    "refs/remotes/origin/main": D,
}
VIEW = FakeView(
    views=(REFS, {**REFS, "refs/heads/main": D}, {"HEAD": REFS["HEAD"]}),
    history={A: [], B: [A], C: [A], D: [B], E: [D, C]},
)


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        ("HEAD", E),
        ("main", E),
        ("refs/heads/main", E),
        ("refs/tags/both", D),
        ("v1.0", B),
        ("origin/main", D),
        ("beef", C),
        ("base", None),
        (E, E),
        ("eeee", E),
        ("abcd1", A),
        ("HEAD~", D),
        ("HEAD~0", E),
        ("HEAD~2", B),
        ("HEAD^", D),
        ("HEAD^0", E),
        ("HEAD^2", C),
        ("HEAD^2~1", A),
        ("HEAD^^", B),
        ("HEAD~1^1~1", A),
        ("v1.0^", A),
        ("main@{0}", E),
        ("main@{1}", D),
        ("@{1}", D),
        ("HEAD@{1}~1", B),
        ("HEAD@{2}", None),
    ],
)
def test_resolves(revision: str, commit: str | None) -> None:
    assert resolve(revision, VIEW) == commit


@pytest.mark.parametrize(
    ("revision", "message", "remedy"),
    [
        ("", "not a revision", "Write"),
        ("mian", "nothing is named 'mian'", "Did you mean main"),
        ("orgin/main", "nothing", "origin/main"),
        ("xyzzy", "nothing", "patchhub log"),
        ("abc", "nothing", "4 digits"),
        ("abcd", "ambiguous: abcd10000000, abcd20000000", "more digits"),
        ("both", "ambiguous", "refs/tags/both or refs/heads/both"),
        ("f" * 64, "nothing", "patchhub log"),
        ("a" * 40, "Hub", "Pull"),
        ("refs/heads/none", "nothing", "log"),
        ("HEAD~4", "beyond the first", "base"),
        ("HEAD^3", "beyond the first", "base"),
        ("base~1", "beyond the first", "base"),
        ("main@{2}", "did not exist 2 operations ago", "reflog"),
        ("main@{999999999}", "did not exist", "reflog"),
        ("none@{1}", "nothing", "log"),
        ("HEAD~99999999999999999999", "nothing", "log"),
        ("~1", "not a revision", "Write"),
        ("ABCD1", "nothing", "log"),
    ],
)
def test_refuses(revision: str, message: str, remedy: str) -> None:
    with pytest.raises(RevisionError, match=message) as caught:
        resolve(revision, VIEW)
    assert remedy in (caught.value.remedy or "")


@given(st.text(max_size=12) | st.text("HEAD~^@{}0123main", max_size=12))
def test_any_text_resolves_or_is_refused(revision: str) -> None:
    try:
        commit = resolve(revision, VIEW)
    except RevisionError:
        return
    assert commit in {None, *VIEW.history}


def test_follow() -> None:
    assert follow("HEAD", REFS) == E
    assert follow("HEAD", {"HEAD": "ref: refs/heads/main"}) is None
    assert follow("HEAD", {"HEAD": A}) == A


@pytest.mark.parametrize(
    "ref",
    ["HEAD", "refs/heads/main", "refs/heads/a/b-c_d.e", "refs/tags/v1.0", "refs/remotes/origin/x", f"refs/notes/{A}/s"],
)
def test_usable_names(ref: str) -> None:
    check_ref(ref)


@pytest.mark.parametrize(
    "name",
    [
        *("", "HEAD", "base", "refs/heads/x", "-x", ".x", "x.", "/x", "x/", "a//b", "a..b", "a b", "a~b", "a^b", "a:b"),
        *("a?b", "a*b", "a[b", "a\\b", "a@{b", "@", "a.lock", "a.lock/b", "a/.b", "a\x00b", "a\nb", "x\n", A, "a" * 40),
        *("a\x7fb", "a\x9bb", "a\udce9b"),
    ],
)
def test_names_with_another_meaning_are_refused(name: str) -> None:
    with pytest.raises(RevisionError):
        check_ref(f"refs/heads/{name}")


@pytest.mark.parametrize("ref", ["", "main", "refs/main", "refs/other/x", "head"])
def test_refs_have_a_namespace(ref: str) -> None:
    with pytest.raises(RevisionError):
        check_ref(ref)


@given(st.text(max_size=8))
def test_a_usable_branch_name_resolves_to_its_branch(name: str) -> None:
    try:
        check_ref(f"refs/heads/{name}")
    except RevisionError:
        return
    view = FakeView(views=({f"refs/heads/{name}": C},), history=VIEW.history)
    assert resolve(name, view) == C


def test_targets() -> None:
    check_target("HEAD", "ref: refs/heads/main")
    check_target("refs/heads/main", A)
    for ref, target in (("refs/heads/a", "ref: refs/heads/b"), ("HEAD", "ref: refs/tags/v1"), ("HEAD", "main")):
        with pytest.raises(RevisionError):
            check_target(ref, target)
