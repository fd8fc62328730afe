"""Signatures in the form of OpenSSF Model Signing, with an elliptic curve key: the extra ``patchhub[signing]``.

The library signs folders of files. Here the folder holds one file, the statement, whose commit id covers the base, every fact and every
weight below it; the bundle that comes out is one that the library's own `model_signing verify` checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from patchhub.errors import SettingsError
from patchhub.signing.ssh import principal_of
from patchhub.signing.statements import Verdict

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
