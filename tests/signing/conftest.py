"""Keys of three people, a file that allows two of them, and a repository without a model that signs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from patchhub.repository import Repository
from patchhub.signing.ssh import SshKey
from tests.pins.history import AUTHOR, EPOCH, commit_facts, init

PEOPLE = ("ada", "bob", "eve")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a private key of each of `PEOPLE`, and ``allowed``: Ada and Bob."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not there: install openssh-client")
    folder = tmp_path_factory.mktemp("keys")
    for name in PEOPLE:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    lines = [f"{name}@example.org {public(folder / name)}\n" for name in ("ada", "bob")]
    (folder / "allowed").write_text("".join(lines), encoding="utf-8")
    return folder


def public(key: Path) -> str:
    """Key type and base64 of the public key beside a private one."""
    return " ".join(key.with_name(f"{key.name}.pub").read_text(encoding="utf-8").split()[:2])


@pytest.fixture
def ada(keys: Path) -> SshKey:
    return SshKey(keys / "ada", dict(os.environ))


@pytest.fixture
def repo(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Two commits of handmade columns by Ada, who has a key and signs when asked; Ada and Bob are allowed signers."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    folder = tmp_path / "store"
    folder.mkdir()
    init(folder)
    commit_facts(folder, "two facts", {"Ann": "French", "Bob": "German"})
    commit_facts(folder, "a fact", {"Eve": "Czech"})
    repository = Repository(folder, progress=False)
    for key, value in (("author", AUTHOR), ("sign.key", keys / "ada"), ("sign.allowed", keys / "allowed")):
        repository.config(key, str(value))
    return repository
