"""Signatures in the form of OpenSSF Model Signing, with a key, a certificate or keyless (Sigstore): the extra ``patchhub[signing]``.

The library signs folders of files. Here the folder holds one file, the statement, whose commit id covers the base, every fact and every
weight below it; the bundle that comes out is one that the library's own `model_signing verify` checks.

Who vouches for a certificate's key is not the reader, but somebody whom the reader trusts: an authority, whose key the allowed signers have
with OpenSSH's ``cert-authority``, or an issuer of identities, which they name in a remark, ``# sigstore ada@example.org https://issuer``."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from patchhub.errors import SettingsError
from patchhub.signing.ssh import authorities_of, principal_of
from patchhub.signing.statements import Verdict
from patchhub.who import FORMAT

FILE: Final = "statement.json"
"""The one file of the folder that is signed."""

LONGEST: Final = 1 << 20  # characters of a bundle: one by a key has 1,500
MISSING: Final = "the package model-signing is not there"
INSTALL: Final = "Install it: `pip install 'patchhub[signing]'`."


@dataclass(frozen=True)
class EllipticKey:
    """A private key on one of the curves P-256, P-384 and P-521, in a PEM file without a passphrase."""

    path: Path

    @property
    def method(self) -> str:
        return "model-signing"

    def check(self) -> None:
        """Refuse a key that cannot sign, before work is done for it.

        Raises:
            SettingsError: no such file, no such key, or the library is not there.
        """
        self._public()

    def sign(self, statement: bytes, kind: str) -> tuple[str, str]:
        """(public key, bundle) of a statement.

        Raises:
            SettingsError: the key cannot sign.
        """
        public_key = self._public()
        signing = library("signing")
        with TemporaryDirectory() as name:
            folder, bundle = folder_of(Path(name), statement), Path(name) / "bundle.json"
            try:
                signing.Config().use_elliptic_key_signer(private_key=self.path).sign(folder, bundle)
            except (ValueError, TypeError) as error:
                raise self._unfit(error) from error
            return public_key, bundle.read_text(encoding="utf-8")

    def _public(self) -> str:
        """The public key as OpenSSH writes it."""
        if not self.path.is_file():
            raise SettingsError(
                f"there is no key {self.path}",
                remedy="Make one: `openssl ecparam -name prime256v1 -genkey -noout -out FILE`.",
            )
        try:
            library("signing")  # asked for before anything is made
            from cryptography.hazmat.primitives import serialization as form
        except ImportError as error:
            raise SettingsError(f"{MISSING} ({error})", remedy=INSTALL) from error
        try:
            key: Any = form.load_pem_private_key(self.path.read_bytes(), None)
            text = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode("ascii")
        except (ValueError, TypeError, AttributeError) as error:
            raise self._unfit(error) from error
        if not text.startswith("ecdsa-"):
            raise self._unfit(ValueError(f"it is {text.partition(' ')[0]}"))
        return str(text)

    def _unfit(self, error: Exception) -> SettingsError:
        return SettingsError(
            f"{self.path} is no elliptic curve key that Model Signing signs with: {error}",
            remedy="Give a PEM file of a private key on P-256, P-384 or P-521 without a passphrase; SSH keys sign with --with ssh.",
            key=str(self.path),
        )


def verify(statement: bytes, kind: str, public_key: str, text: str, time: str, allowed: Path | None) -> Verdict:
    """Check a bundle against the statement that it must be of; arguments as `patchhub.signing.ssh.verify` has them."""
    try:
        from cryptography.hazmat.primitives import serialization as form

        verifying = library("verifying")
    except ImportError as error:
        return Verdict("unchecked", None, f"{MISSING} ({error}): {INSTALL}")
    if len(text) > LONGEST:
        return Verdict("broken", None, f"its bundle is longer than {LONGEST} characters")
    with TemporaryDirectory() as name:
        folder, bundle, key = folder_of(Path(name), statement), Path(name) / "bundle.json", Path(name) / "key.pem"
        try:
            public: Any = form.load_ssh_public_key(public_key.encode("ascii"))
            key.write_bytes(public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
            bundle.write_text(text, encoding="utf-8")
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, bundle)
        except Exception as error:  # the library and those below it have errors of many kinds
            return Verdict("broken", None, " ".join(str(error).split())[:200] or f"{type(error).__name__}")
    principal = None if allowed is None else principal_of(allowed, public_key, kind, time)
    return Verdict("unknown") if principal is None else Verdict("good", principal)


def library(name: str) -> Any:
    """A module of model-signing, whose functions have no types."""
    return import_module(f"model_signing.{name}")


def folder_of(place: Path, statement: bytes) -> Path:
    folder = place / "patchhub"
    folder.mkdir()
    (folder / FILE).write_bytes(statement)
    return folder


_PARTS: Final = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----\n?", re.DOTALL)


@dataclass(frozen=True)
class Certified:
    """A PEM file: a private key on P-256, P-384 or P-521, its certificate, and those above it up to the authority's own."""

    path: Path

    @property
    def method(self) -> str:
        return "certificate"

    def check(self) -> None:
        """Refuse a file that cannot sign, before work is done for it.

        Raises:
            SettingsError: no such file, not such a file, or the library is not there.
        """
        self.sign(b"{}", "commit")

    def sign(self, statement: bytes, kind: str) -> tuple[str, str]:
        """(public key of the certificate, bundle) of a statement.

        Raises:
            SettingsError: the key cannot sign.
        """
        if not self.path.is_file():
            raise SettingsError(f"there is no key {self.path}", remedy="Name a PEM file of key and certificates.")
        try:
            signing = library("signing")
        except ImportError as error:
            raise SettingsError(f"{MISSING} ({error})", remedy=INSTALL) from error
        parts = [(found[1], found[0]) for found in _PARTS.finditer(self.path.read_bytes())]
        keys = [part for name, part in parts if name.endswith(b"PRIVATE KEY")]
        certificates = [part for name, part in parts if name == b"CERTIFICATE"]
        if len(keys) != 1 or not certificates:
            raise self._unfit(f"it has {len(keys)} private keys and {len(certificates)} certificates")
        with TemporaryDirectory() as name:
            place, files = Path(name), ("key.pem", "own.pem", "chain.pem")
            for file, data in zip(files, (keys[0], certificates[0], b"".join(certificates[1:])), strict=True):
                (place / file).write_bytes(data)
            key, own, chain = (place / file for file in files)
            try:
                chosen = signing.Config().use_certificate_signer(
                    private_key=key, signing_certificate=own, certificate_chain=[chain] if len(certificates) > 1 else []
                )
                chosen.sign(folder_of(place, statement), place / "bundle.json")
            except (ValueError, TypeError, AttributeError) as error:
                raise self._unfit(str(error)) from error
            text = (place / "bundle.json").read_text(encoding="utf-8")
        return _public(_certificates(text)[0]), text

    def _unfit(self, why: str) -> SettingsError:
        return SettingsError(
            f"{self.path} is no key with a certificate: {why}",
            remedy="Give one PEM file: the private key (P-256, P-384 or P-521, no passphrase), its certificate, and those above it.",
            key=str(self.path),
        )


@dataclass(frozen=True)
class Keyless:
    """An identity that the machine has by itself, as a job of a continuous integration has, at Sigstore's public instance."""

    @property
    def method(self) -> str:
        return "sigstore"

    def check(self) -> None:
        """Refuse to begin where there is no identity.

        Raises:
            SettingsError: there is none, or the library is not there.
        """
        try:
            from sigstore.oidc import detect_credential
        except ImportError as error:
            raise SettingsError(f"{MISSING} ({error})", remedy=INSTALL) from error
        try:
            found = detect_credential()
        except Exception as error:  # each kind of machine has errors of its own
            raise _no_identity(f" ({error})") from error
        if not found:
            raise _no_identity("")

    def sign(self, statement: bytes, kind: str) -> tuple[str, str]:
        """(public key of the certificate that was issued, bundle) of a statement.

        Raises:
            SettingsError: there is no identity, or Sigstore was not reached.
        """
        self.check()
        with TemporaryDirectory() as name:
            place = Path(name)
            try:
                chosen = library("signing").Config().use_sigstore_signer(use_ambient_credentials=True)
                chosen.sign(folder_of(place, statement), place / "bundle.json")
            except Exception as error:  # the library and those below it have errors of many kinds
                raise SettingsError(f"Sigstore did not sign: {error}", remedy="Sign with a key: --with ssh.") from error
            text = (place / "bundle.json").read_text(encoding="utf-8")
        return _public(_certificates(text)[0]), text


def verify_certificate(
    statement: bytes, kind: str, public_key: str, text: str, time: str, allowed: Path | None
) -> Verdict:
    """Check a bundle by certificate; arguments as `patchhub.signing.ssh.verify` has them.

    It is good where the topmost of its certificates has a key that the allowed signers name as an authority, for the signer's address, and
    the statement is from the time for which the signer's certificate holds.
    """
    try:
        verifying = library("verifying")
        from cryptography.hazmat.primitives.serialization import Encoding
    except ImportError as error:
        return Verdict("unchecked", None, f"{MISSING} ({error}): {INSTALL}")
    with TemporaryDirectory() as name:
        place = Path(name)
        try:
            chain = _certificates(text)
            if _public(chain[0]) != public_key:
                raise ValueError("its certificate is of another key")
            instant = datetime.strptime(time, FORMAT).replace(tzinfo=timezone.utc)
            if not chain[0].not_valid_before_utc <= instant <= chain[0].not_valid_after_utc:
                raise ValueError("its certificate does not hold at its time")
            (place / "root.pem").write_bytes(chain[-1].public_bytes(Encoding.PEM))
            (place / "bundle.json").write_text(text, encoding="utf-8")
            chosen = verifying.Config().use_certificate_verifier(certificate_chain=[place / "root.pem"])
            chosen.verify(folder_of(place, statement), place / "bundle.json")
        except Exception as error:  # the library and those below it have errors of many kinds
            return Verdict("broken", None, " ".join(str(error).split())[:200] or f"{type(error).__name__}")
    patterns = () if allowed is None else authorities_of(allowed, _public(chain[-1]), kind, time)
    return _named(_identities(chain[0]), patterns)


def verify_keyless(statement: bytes, kind: str, public_key: str, text: str, time: str, allowed: Path | None) -> Verdict:
    """Check a keyless bundle where the allowed signers name its identity and issuer; one of others is not checked, but unknown to you."""
    try:
        verifying = library("verifying")
        certificate = _certificates(text)[0]
        identities = _identities(certificate)
        if _public(certificate) != public_key:
            raise ValueError("its certificate is of another key")
    except ImportError as error:
        return Verdict("unchecked", None, f"{MISSING} ({error}): {INSTALL}")
    except Exception as error:  # whatever is no bundle
        return Verdict("broken", None, f"it is no bundle with a certificate: {error}"[:200])
    lines = [] if allowed is None else allowed.read_text(encoding="utf-8", errors="replace").splitlines()
    words = [line.split() for line in lines if line.startswith("# sigstore ")]
    named = [(found[2], found[3]) for found in words if len(found) == 4 and found[2] in identities]
    if not named:
        return Verdict(
            "unchecked", None, f"no line `# sigstore {' '.join(identities[:1])} ISSUER` is in your allowed signers"
        )
    identity, issuer = named[0]
    with TemporaryDirectory() as name:
        (Path(name) / "bundle.json").write_text(text, encoding="utf-8")
        try:
            chosen = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
        except Exception as error:  # what Sigstore's keys are is asked over the network
            return Verdict("unchecked", None, f"Sigstore cannot be asked: {error}"[:200])
        try:
            chosen.verify(folder_of(Path(name), statement), Path(name) / "bundle.json")
        except Exception as error:  # as above
            return Verdict("broken", None, " ".join(str(error).split())[:200] or f"{type(error).__name__}")
    return Verdict("good", identity)


def _named(identities: Sequence[str], patterns: Sequence[str]) -> Verdict:
    for identity in identities:
        if any(fnmatch.fnmatchcase(identity, pattern) for pattern in patterns):
            return Verdict("good", identity)
    return Verdict("unknown")


def _certificates(text: str) -> list[Any]:
    """The certificates of a bundle, the signer's first.

    Raises:
        ValueError: it has none.
    """
    from cryptography.x509 import load_der_x509_certificate

    if len(text) > LONGEST:
        raise ValueError(f"its bundle is longer than {LONGEST} characters")
    material = json.loads(text)["verificationMaterial"]
    chain = material.get("x509CertificateChain")
    found = chain["certificates"] if chain else [material["certificate"]]
    return [load_der_x509_certificate(base64.b64decode(one["rawBytes"])) for one in found]


def _public(certificate: Any) -> str:
    from cryptography.hazmat.primitives import serialization as form

    return str(certificate.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode("ascii"))


def _identities(certificate: Any) -> list[str]:
    """Addresses that a certificate is about, else the common name of its subject."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [str(found.value) for found in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    kinds = (x509.RFC822Name, x509.UniformResourceIdentifier)
    return [str(name) for kind in kinds for name in names.get_values_for_type(kind)]


def _no_identity(why: str) -> SettingsError:
    return SettingsError(
        f"there is no identity at hand to sign with{why}",
        remedy="Keyless signing is for jobs that have one (GitHub Actions with `id-token: write`, ...); sign with a key: --with ssh.",
    )
