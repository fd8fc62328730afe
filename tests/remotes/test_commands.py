"""The commands, between two stores over a folder: what a user types and sees."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from patchhub.cli.main import main
from patchhub.errors import RepositoryError
from patchhub.fsio import is_shared
from patchhub.objects import Request
from patchhub.porcelain import share
from patchhub.progress import Silent
from patchhub.remotes.remote import FileRemote, Tip
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.loading import open_path
from tests.export.models import model_folder, model_store
from tests.remotes.stores import AUTHOR, TIME, add_batch, add_patch, move


def run(folder: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["--repo", str(folder), *arguments])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == code, f"{arguments}: exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "base", "llama")


@pytest.fixture
def ours(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    with model_store(folder, base, range(2), range(2, 4)) as store:
        move(store, {"refs/tags/v1": (None, str(store.resolve("HEAD~1")))})
    run(folder, "remote", "add", "origin", str(tmp_path / "shared"))
    return folder


@pytest.mark.parametrize("address", ["", "nosuch://q", "simplecache::nosuch://q"])
def test_addresses_that_nothing_opens_are_refused_at_once(address: str, ours: Path) -> None:
    before = run(ours, "remote", "list").stdout
    assert "hf://user/repo" in run(ours, "remote", "add", "x", address, code=2).stderr
    assert run(ours, "remote", "list").stdout == before


def test_undo_says_what_it_undid_and_that_a_push_stays(ours: Path) -> None:
    run(ours, "push")
    told = run(ours, "undo", "--all").stdout
    assert "`push` undone: origin/main" in told
    assert "not taken back" in told
    again = run(ours, "redo").stdout
    assert "`push` done again" in again
    assert "not taken back" not in again
    run(ours, "branch", "new")
    run(ours, "undo")
    run(ours, "redo")
    assert "`branch` undone: new" in run(ours, "undo").stdout


def test_a_damaged_object_is_fetched_again_as_the_error_says(ours: Path) -> None:
    run(ours, "push")
    with Store.open(ours) as store:
        (patch,) = {patch for patch, _ in store.commit(str(store.resolve("HEAD"))).added}
        path = store.objects.path(store.patch(patch).tensors)
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    assert "fetch --repair" in run(ours, "fsck", code=7).stdout
    assert "1 object repaired" in run(ours, "fetch", "--repair").stdout
    run(ours, "fsck")
    assert "Nothing new" in run(ours, "fetch", "--repair").stdout


def test_a_remote_is_to_be_cloned_not_loaded(ours: Path, tmp_path: Path) -> None:
    run(ours, "push")
    with pytest.raises(RepositoryError) as caught:
        open_path(tmp_path / "shared")
    assert "patchhub clone" in str(caught.value.remedy)


def test_push_clone_and_pull(ours: Path, base: Path, tmp_path: Path) -> None:
    planned = json.loads(run(ours, "push", "--all", "--dry-run", "--json").stdout)
    assert not (tmp_path / "shared").exists()
    assert json.loads(run(ours, "push", "--all", "--json").stdout)[0] == planned[0]
    assert "up to date" in run(ours, "push", "--all").stdout
    theirs = tmp_path / "theirs"
    run(ours, "clone", str(tmp_path / "shared"), str(theirs), "--base", str(base))
    heads = [json.loads(run(folder, "status", "--json").stdout)["head"]["id"] for folder in (ours, theirs)]
    assert heads[0] == heads[1]
    with Store.open(theirs) as store:
        add_batch(store, range(10, 11))
    with Store.open(ours) as store:
        add_batch(store, range(20, 21))
    run(theirs, "push")
    error = run(ours, "push", code=11).stderr
    assert "patchhub pull" in error
    assert len(error.strip().splitlines()) == 2
    assert "1 fact from theirs alone" in run(ours, "pull").stdout
    run(ours, "push")
    assert "fast-forward" in run(theirs, "pull").stdout
    assert "Nothing new" in run(theirs, "fetch").stdout
    assert json.loads(run(theirs, "fsck", "--json").stdout)["sound"]


def test_a_pull_that_stops_says_who_says_what(ours: Path, base: Path, tmp_path: Path) -> None:
    run(ours, "push")
    theirs = tmp_path / "theirs"
    run(ours, "clone", str(tmp_path / "shared"), str(theirs), "--base", str(base))
    for folder, target in ((ours, "Dutch"), (theirs, "Welsh")):
        with Store.open(folder) as store:
            add_patch(store, [Request.make("The mother tongue of {} is", "Ada", target)])
    run(theirs, "push")
    said = run(ours, "pull", code=4).stdout
    assert all(part in said for part in ("The mother tongue of Ada is", "Dutch", "Welsh", "merge --continue"))
    run(ours, "merge", "--continue", "--theirs")
    run(ours, "push")


def test_branches_of_a_remote(ours: Path, base: Path, tmp_path: Path) -> None:
    run(ours, "branch", "side")
    run(ours, "push", "--all")
    theirs = tmp_path / "theirs"
    run(ours, "clone", str(tmp_path / "shared"), str(theirs), "--base", str(base))
    assert "origin/side" in run(theirs, "branch", "-r").stdout
    assert "on branch side" in run(theirs, "switch", "side").stdout  # made from the remote's
    run(theirs, "remote", "add", "second", str(tmp_path / "shared"))
    run(theirs, "fetch", "second")
    run(theirs, "switch", "main")
    run(theirs, "branch", "-d", "side")
    assert "switch -c side origin/side" in run(theirs, "switch", "side", code=5).stderr


def test_withholding_texts_that_were_public(ours: Path, base: Path, tmp_path: Path) -> None:
    run(ours, "push", "--all")
    assert "pushed before" in run(ours, "push", "--private-facts").stdout
    theirs = tmp_path / "theirs"
    run(ours, "clone", str(tmp_path / "shared"), str(theirs), "--base", str(base))
    assert "Person" not in run(theirs, "show").stdout
    assert json.loads(run(theirs, "fsck", "--json").stdout)["sound"]


def test_remotes_are_named(ours: Path, tmp_path: Path) -> None:
    run(ours, "push")
    run(ours, "remote", "add", "hub", "hf://user/facts")
    assert json.loads(run(ours, "remote", "list", "--json").stdout) == {
        "hub": "hf://user/facts",
        "origin": str(tmp_path / "shared"),
    }
    assert "there is a remote hub already" in run(ours, "remote", "add", "hub", "x", code=2).stderr
    assert "names no repository" in run(ours, "remote", "add", "bad", "hf://facts", code=2).stderr
    assert "cannot name a remote" in run(ours, "remote", "add", "a/b", "x", code=2).stderr
    run(ours, "remote", "remove", "origin")
    assert "there is no remote 'origin'" in run(ours, "fetch", "origin", code=2).stderr
    assert "offline" in run(ours, "fetch", "hub", code=11).stderr


def test_export_and_import(ours: Path, base: Path, tmp_path: Path) -> None:
    done = json.loads(run(ours, "export", "peft", "--out", str(tmp_path / "out"), "--json").stdout)
    assert done["error"] < 1e-6
    assert done["commit"][:12] in done["out"]
    run(ours, "export", "diff", "--out", str(tmp_path / "deltas.safetensors"))
    run(ours, "export", "checkpoint", "--out", str(tmp_path / "fused"))
    other = tmp_path / "other"
    model_store(other, base).close()
    assert "rank" in run(other, "import", done["out"]).stdout
    assert "active already" in run(other, "import", done["out"], code=3).stderr
    assert "(0 active), 1 imported change" in run(other, "log").stdout
    assert "an imported change of" in run(other, "show").stdout
    assert "0 active facts and 1 imported change" in run(other, "status").stdout
    run(other, "revert", "HEAD")
    run(other, "import", str(tmp_path / "fused"))
    assert json.loads(run(other, "fsck", "--json").stdout)["sound"]


CHECK = """
import sys
from patchhub.cli.main import main
try:
    main(sys.argv[1:], prog_name="patchhub")
except SystemExit as done:
    assert not done.code, done.code
heavy = HEAVY & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("verb", "heavy"),
    [
        (["remote", "list"], {"torch", "transformers", "numpy", "huggingface_hub"}),
        (["push"], {"torch", "transformers", "huggingface_hub"}),
        (["pull"], {"torch", "transformers", "huggingface_hub"}),
    ],
)
def test_sharing_imports_no_torch(verb: list[str], heavy: set[str], ours: Path) -> None:
    run(ours, "push")
    check = CHECK.replace("HEAVY", repr(heavy))
    command = [sys.executable, "-c", check, "--repo", str(ours), *verb]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no groups there")
def test_what_a_fetch_leaves_that_died_is_the_groups_to_take_away(ours: Path, base: Path, tmp_path: Path) -> None:
    """Whatever the umask of who died."""
    run(ours, "push")
    clone, seen = tmp_path / "clone", []

    def look(self: FileRemote, tip: Tip, ids: Collection[str], into: Path, *rest: Any) -> Iterator[tuple[str, Path]]:
        seen.extend([into, into.parent])
        assert is_shared(into)
        assert is_shared(into.parent)
        return read(self, tip, ids, into, *rest)

    read, before = FileRemote.read, os.umask(0o077)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(FileRemote, "read", look)
            address = str(tmp_path / "shared")
            share.clone(address, clone, Silent(), who=Who(AUTHOR, TIME), base=str(base), shared=True)
    finally:
        os.umask(before)
    assert seen
    assert not any(path.exists() for path in seen)


def test_a_fetch_that_died_before_it_pinned_the_metric_is_made_up_for_by_the_next(
    ours: Path, base: Path, tmp_path: Path
) -> None:
    """The refs moved and the config did not: a second fetch brings nothing new, and pins all the same."""
    run(ours, "push")
    clone = tmp_path / "clone"
    address = str(tmp_path / "shared")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(share, "_adopt_recording", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            share.clone(address, clone, Silent(), who=Who(AUTHOR, TIME), base=str(base))
    share.clone(address, clone, Silent(), who=Who(AUTHOR, TIME), base=str(base))
    with Store.open(ours) as theirs, Store.open(clone) as store:
        assert store.config.recording == theirs.config.recording != None  # noqa: E711


def test_a_killed_clone_is_taken_up_again(ours: Path, base: Path, tmp_path: Path) -> None:
    """Killed after the store was made, and again after the objects came and before a branch was checked out."""
    run(ours, "push")
    address, clone = str(tmp_path / "shared"), tmp_path / "clone"
    for killed in ("_fetch", "_check_out"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(share, killed, lambda *_, **__: (_ for _ in ()).throw(SystemExit(9)))  # nothing cleans up
            with pytest.raises(SystemExit):
                share.clone(address, clone, Silent(), who=Who(AUTHOR, TIME), base=str(base))
        assert (clone / ".patchhub").is_dir()
    done = share.clone(address, clone, Silent(), who=Who(AUTHOR, TIME), base=str(base))
    with Store.open(ours) as theirs:
        assert done.commit == theirs.head[1]
    with pytest.raises(RepositoryError, match="exists already"):
        share.clone(address, clone, Silent(), who=Who(AUTHOR, TIME), base=str(base))


@pytest.mark.skipif(os.name == "nt", reason="no groups there")
@pytest.mark.parametrize("verb", ["init", "clone", "clone that was begun as one's own"])
def test_a_shared_store_is_the_groups_whatever_the_umask(verb: str, ours: Path, base: Path, tmp_path: Path) -> None:
    run(ours, "push")
    before = os.umask(0o077)
    try:
        address, folder = str(tmp_path / "shared"), str(tmp_path / "group")
        if verb == "clone that was begun as one's own":
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(share, "_fetch", lambda *_, **__: (_ for _ in ()).throw(SystemExit(9)))
                with pytest.raises(SystemExit):
                    share.clone(address, Path(folder), Silent(), who=Who(AUTHOR, TIME), base=str(base))
        cloning = ["clone", address, folder, "--base", str(base), "--shared"]
        making = ["init", str(base), "--shared", "--repo", folder] if verb == "init" else cloning
        result = CliRunner().invoke(main, making)
        assert result.exit_code == 0, result.output
        with Store.open(Path(folder)) as store:
            add_batch(store, range(20, 22))
        for path in (Path(folder) / ".patchhub").rglob("*"):
            assert is_shared(path) or not path.is_dir(), path
            wanted = stat.S_IRGRP if path.is_file() and "objects" in path.parts else stat.S_IRGRP | stat.S_IWGRP
            assert path.stat().st_mode & wanted == wanted, path
            assert not path.stat().st_mode & stat.S_IRWXO
    finally:
        os.umask(before)
