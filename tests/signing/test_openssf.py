"""Signatures as OpenSSF Model Signing makes them: the library itself checks the bundle."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patchhub.errors import SettingsError
from patchhub.repository import Repository
from patchhub.signing.openssf import EllipticKey, verify
from tests.signing.conftest import public

TIME = "2026-11-21T09:30:00Z"
WORDS = b'{"commit":"..."}'


@pytest.fixture(scope="module", autouse=True)
def _there() -> None:
    pytest.importorskip("OpenSSL", reason="pyopenssl is not there: pip install 'patchhub[signing]'")
    pytest.importorskip("model_signing", reason="model-signing is not there: pip install 'patchhub[signing]'")


@pytest.fixture
def carol(keys: Path, tmp_path: Path) -> Path:
    """A key on P-256 in a PEM file, as `ssh-keygen -m PEM` and OpenSSL write it."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "256", "-m", "PEM", "-N", "", "-f", str(tmp_path / "carol")],
        check=True,
    )
    return tmp_path / "carol"


def test_a_bundle_is_good_unknown_or_broken(carol: Path, tmp_path: Path, keys: Path) -> None:
    key, text = EllipticKey(carol).sign(WORDS, "commit")
    assert key == public(carol)
    (tmp_path / "allowed").write_text(f'carol@example.org namespaces="patchhub-*" {key}\n', encoding="utf-8")
    assert verify(WORDS, "commit", key, text, TIME, tmp_path / "allowed") == ("good", "carol@example.org", "")
    assert verify(WORDS, "commit", key, text, TIME, keys / "allowed").status == "unknown"
    broken = [
        (WORDS + b" ", key, text),
        (WORDS, public(keys / "ada"), text),
        (WORDS, key, text[:-9]),
        (WORDS, key, "{}"),
    ]
    for words, by, bundle in broken:
        assert verify(words, "commit", by, bundle, TIME, tmp_path / "allowed").status == "broken"


def test_the_librarys_own_command_checks_it(carol: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from model_signing import verifying

    key, text = EllipticKey(carol).sign(WORDS, "commit")
    pem = form.load_ssh_public_key(key.encode()).public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    (tmp_path / "bundle").write_text(text, encoding="utf-8")
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "statement.json").write_bytes(WORDS)
    checking = verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "key.pem")
    checking.verify(tmp_path / "any", tmp_path / "bundle")


def test_commits_and_approvals_are_signed_with_it(carol: Path, repo: Repository, keys: Path, tmp_path: Path) -> None:
    lines = (keys / "allowed").read_text(encoding="utf-8") + f"carol@example.org {public(carol)}\n"
    (tmp_path / "allowed").write_text(lines, encoding="utf-8")
    repo.config("sign.allowed", str(tmp_path / "allowed"))
    repo.sign(with_="model-signing", key=carol)
    repo.approve(key=keys / "bob")
    repo.config("sign.method", "model-signing")  # Bob's key says by its form that it is one of OpenSSH's
    repo.approve(key=keys / "bob")
    assert repo.verify().trusted
    assert {(s.method, s.principal) for s in repo.verify().signatures} == {
        ("model-signing", "carol@example.org"),
        ("ssh", "bob@example.org"),
    }


def test_other_keys_are_refused(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key", encoding="utf-8")
    named = {
        keys / "ada": "no elliptic curve key",
        tmp_path / "text": "no elliptic curve key",
        tmp_path / "none": "no key",
    }
    for key, words in named.items():
        with pytest.raises(SettingsError, match=words):
            EllipticKey(key).check()
