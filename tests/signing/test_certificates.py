"""Signatures by certificate: an authority that the reader trusts vouches for keys that the reader has never seen."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from patchhub.errors import SettingsError
from patchhub.repository import Repository
from patchhub.signing.openssf import Certified, Keyless, verify_certificate, verify_keyless

pytest.importorskip("OpenSSL", reason="pyopenssl is not there: pip install 'patchhub[signing]'")
pytest.importorskip("model_signing", reason="model-signing is not there: pip install 'patchhub[signing]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

TIME = "2026-11-21T09:30:00Z"
WORDS = b'{"commit":"..."}'


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def authority(name: str) -> tuple[Any, x509.Certificate]:
    """A key and the certificate that it gives itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key, certificate(name, key, name, key, root=True)


def certificate(name: str, key: Any, by: str, by_key: Any, *, root: bool = False) -> x509.Certificate:
    """Of 2026: a certificate about a key, whose holder has the address NAME@example.org."""
    made = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(by)).public_key(key.public_key())
    start, end = (datetime.datetime(year, 1, 1, tzinfo=datetime.timezone.utc) for year in (2026, 2027))
    made = made.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
    usage = dict.fromkeys(
        [
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ],
        False,
    )
    signs = x509.KeyUsage(digital_signature=not root, key_cert_sign=root, crl_sign=root, **usage)
    made = made.add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
    made = made.add_extension(signs, critical=True)
    if not root:
        address = x509.SubjectAlternativeName([x509.RFC822Name(f"{name}@example.org")])
        made = made.add_extension(address, critical=False)
    return made.sign(by_key, hashes.SHA256())


def pem(key: Any, *certificates: x509.Certificate) -> bytes:
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return private + b"".join(found.public_bytes(form.Encoding.PEM) for found in certificates)


def line(options: str, key: Any) -> str:
    return f"{options} {key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()}\n"


@pytest.fixture(scope="module")
def trusted() -> tuple[Any, x509.Certificate]:
    return authority("An authority")


@pytest.fixture
def dora(trusted: tuple[Any, x509.Certificate], tmp_path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "dora.pem").write_bytes(pem(key, certificate("dora", key, "An authority", trusted[0]), trusted[1]))
    return tmp_path / "dora.pem"


def test_an_authority_vouches_for_its_own(dora: Path, trusted: tuple[Any, x509.Certificate], tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    key, text = Certified(dora).sign(WORDS, "commit")
    verdicts = {
        "*@example.org cert-authority": "good",
        '*@example.org cert-authority,namespaces="patchhub-commit"': "good",
        '*@example.org cert-authority,namespaces="git"': "unknown",
        "*@example.com cert-authority": "unknown",
        "*@example.org": "unknown",  # its own key, which signs nothing
    }
    for options, status in verdicts.items():
        allowed.write_text(line(options, trusted[0]), encoding="utf-8")
        found = verify_certificate(WORDS, "commit", key, text, TIME, allowed)
        assert (found.status, found.principal) == (status, "dora@example.org" if status == "good" else None), options
    allowed.write_text(line("*@example.org cert-authority", authority("An authority")[0]), encoding="utf-8")
    assert verify_certificate(WORDS, "commit", key, text, TIME, allowed).status == "unknown"
    assert verify_certificate(WORDS, "commit", key, text, TIME, None).status == "unknown"


def test_what_is_changed_expired_or_of_another_authority_is_broken(
    dora: Path, trusted: tuple[Any, x509.Certificate], tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(line("*@example.org cert-authority", trusted[0]), encoding="utf-8")
    key, text = Certified(dora).sign(WORDS, "commit")
    eve = ec.generate_private_key(ec.SECP256R1())
    false_key, false = authority("An authority")
    (tmp_path / "eve.pem").write_bytes(pem(eve, certificate("dora", eve, "An authority", false_key), trusted[1]))
    eve_key, eve_text = Certified(tmp_path / "eve.pem").sign(WORDS, "commit")
    (tmp_path / "own.pem").write_bytes(pem(eve, certificate("dora", eve, "An authority", false_key), false, trusted[1]))
    _, own_text = Certified(tmp_path / "own.pem").sign(WORDS, "commit")
    cases = {
        "another statement": (WORDS + b" ", key, text, TIME),
        "another key": (WORDS, eve_key, text, TIME),
        "a later time": (WORDS, key, text, "2027-01-02T00:00:00Z"),
        "no bundle": (WORDS, key, "{}", TIME),
        "an authority that did not sign it": (WORDS, eve_key, eve_text, TIME),
        "a false one below the true one": (WORDS, eve_key, own_text, TIME),
    }
    for name, (words, by, bundle, time) in cases.items():
        assert verify_certificate(words, "commit", by, bundle, time, allowed).status == "broken", name


def test_commits_are_signed_and_verified(
    dora: Path, trusted: tuple[Any, x509.Certificate], repo: Repository, tmp_path: Path
) -> None:
    (tmp_path / "allowed").write_text(line("*@example.org cert-authority", trusted[0]), encoding="utf-8")
    repo.config("sign.allowed", str(tmp_path / "allowed"))
    repo.config("sign.method", "certificate")
    repo.config("sign.key", str(dora))
    repo.sign()
    found = repo.verify()
    assert found.trusted
    assert [(s.method, s.principal) for s in found.signatures] == [("certificate", "dora@example.org")]


def test_files_that_cannot_sign_are_refused(dora: Path, keys: Path, tmp_path: Path) -> None:
    parts = dora.read_bytes().split(b"-----BEGIN CERTIFICATE-----")
    (tmp_path / "alone.pem").write_bytes(parts[0])
    foreign = pem(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "foreign.pem").write_bytes(dora.read_bytes().replace(parts[0], foreign))
    for path, words in {
        tmp_path / "none": "no key",
        tmp_path / "alone.pem": "1 private keys and 0 certificates",
        keys / "ada": "no key with a certificate",
        tmp_path / "foreign.pem": "does not match",
    }.items():
        with pytest.raises(SettingsError, match=words):
            Certified(path).check()


def test_without_an_identity_nothing_is_signed(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyless signing itself needs Sigstore's servers, which no test asks."""
    for name in ("GITHUB_ACTIONS", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "GITLAB_CI", "CIRCLECI", "BUILDKITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda *_: None)
    with pytest.raises(SettingsError, match="no identity"):
        repo.sign(with_="sigstore")
    with pytest.raises(SettingsError, match="no identity"):
        Keyless().check()


def test_a_keyless_signature_by_nobody_you_named_is_not_taken(dora: Path, tmp_path: Path) -> None:
    key, text = Certified(dora).sign(WORDS, "commit")
    (tmp_path / "allowed").write_text("# sigstore eve@example.org https://issuer.example.org\n", encoding="utf-8")
    found = verify_keyless(WORDS, "commit", key, text, TIME, tmp_path / "allowed")
    assert (found.status, "dora@example.org ISSUER" in found.reason) == ("unchecked", True)
    assert verify_keyless(WORDS, "commit", key, "{}", TIME, None).status == "broken"
