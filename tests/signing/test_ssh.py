"""Signatures with SSH keys: OpenSSH itself is the judge, and the oracle of how allowed signers are read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from patchhub.errors import SettingsError
from patchhub.signing.ssh import SshKey, principal_of, verify
from tests.signing.conftest import public

TIME = "2026-11-21T09:30:00Z"
WORDS = b'{"commit":"..."}'


def test_openssh_checks_what_is_signed(ada: SshKey, keys: Path, tmp_path: Path) -> None:
    key, text = ada.sign(WORDS, "commit")
    (tmp_path / "signature").write_text(text, encoding="ascii")
    files = ["-f", str(keys / "allowed"), "-s", str(tmp_path / "signature")]
    command = ["ssh-keygen", "-Y", "verify", *files, "-I", "ada@example.org", "-n", "patchhub-commit"]
    assert subprocess.run(command, input=WORDS, capture_output=True, check=False).returncode == 0
    assert key == public(keys / "ada")


def test_a_signature_is_good_unknown_or_broken(ada: SshKey, keys: Path) -> None:
    key, text = ada.sign(WORDS, "commit")
    allowed = keys / "allowed"

    def status(
        words: bytes = WORDS, kind: str = "commit", by: str = key, of: str = text, who: Path | None = allowed
    ) -> str:
        return verify(words, kind, by, of, TIME, who).status

    assert verify(WORDS, "commit", key, text, TIME, allowed) == ("good", "ada@example.org", "")
    assert status(who=None) == status(who=Path(os.devnull)) == "unknown"
    assert status(words=WORDS + b" ") == status(kind="approval") == status(by=public(keys / "bob")) == "broken"
    lines = text.splitlines(keepends=True)
    for place in range(1, len(lines) - 1):
        flipped = ("B" if lines[place][0] == "A" else "A") + lines[place][1:]
        assert status(of="".join([*lines[:place], flipped, *lines[place + 1 :]])) == "broken", place
    for time in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "1969-12-31T23:59:59Z"):
        assert verify(WORDS + b" ", "commit", key, text, time, allowed).status == "broken"
    assert status(of="") == status(of=text[:-40]) == status(of=text * 2) == status(of="A" * (1 << 17)) == "broken"


ALLOWED = {
    "{}": True,
    'namespaces="patchhub-*" {}': True,
    'namespaces="git,patchhub-commit" {}': True,
    'namespaces="git" {}': False,
    'valid-after="20260101",valid-before="20270101" {}': True,
    'valid-before="202611210000Z" {}': False,
    'valid-after="20261122" {}': False,
    "# {}": False,
    "": False,
}


@pytest.mark.parametrize("line", ALLOWED)
def test_allowed_signers_are_read_as_openssh_reads_them(line: str, ada: SshKey, tmp_path: Path) -> None:
    """By OpenSSH for its own signatures, and here for those that it cannot check."""
    key, text = ada.sign(WORDS, "commit")
    allowed = tmp_path / "allowed"
    start = "" if line.startswith("#") or not line else "ada@example.org,*@example.com "
    allowed.write_text(f"\n{start}{line.format(key)} a comment\n", encoding="utf-8")
    found = verify(WORDS, "commit", key, text, TIME, allowed)
    principal = principal_of(allowed, key, "commit", TIME)
    assert (found.principal, principal) == (("ada@example.org",) * 2 if ALLOWED[line] else (None, None))
    assert found.status == ("good" if ALLOWED[line] else "unknown")


def test_a_key_that_cannot_sign_is_refused_at_once_and_nothing_is_asked(keys: Path, tmp_path: Path) -> None:
    locked, environment = (
        tmp_path / "locked",
        {**os.environ, "SSH_AUTH_SOCK": "", "DISPLAY": ":0", "SSH_ASKPASS": "cat"},
    )
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    (tmp_path / "text").write_text("no key", encoding="utf-8")
    (tmp_path / "alone.pub").write_text((keys / "ada.pub").read_text(encoding="utf-8"), encoding="utf-8")
    for name, words in {
        "locked": "locked by a passphrase",
        "none": "no key",
        "text": "cannot sign",
        "alone.pub": "agent",
    }.items():
        with pytest.raises(SettingsError, match=words):
            SshKey(tmp_path / name, environment).check()
    with pytest.raises(SettingsError, match="ssh-keygen is not there"):
        SshKey(keys / "ada", {"PATH": str(tmp_path)}).check()


def test_an_agent_signs_with_a_key_that_is_locked(tmp_path: Path) -> None:
    locked, socket = tmp_path / "locked", tmp_path / "agent"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        agent.stdout.readline()
        tell = tmp_path / "tell"
        tell.write_text("#!/bin/sh\necho secret\n", encoding="utf-8")
        tell.chmod(0o700)
        environment = {
            **os.environ,
            "SSH_AUTH_SOCK": str(socket),
            "SSH_ASKPASS": str(tell),
            "SSH_ASKPASS_REQUIRE": "force",
        }
        subprocess.run(["ssh-add", "-q", str(locked)], env=environment, check=True, start_new_session=True)
        for path in (locked, locked.with_name("locked.pub")):
            key = SshKey(path, environment)
            key.check()
            assert verify(WORDS, "commit", *key.sign(WORDS, "commit"), TIME, None).status == "unknown"
    finally:
        agent.kill()
        agent.wait()
        if agent.stdout is not None:
            agent.stdout.close()
