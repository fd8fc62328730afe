"""Signatures with SSH keys, made and checked by OpenSSH's `ssh-keygen -Y`, as git does; and the format of allowed signers."""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from patchhub.errors import SettingsError
from patchhub.signing.statements import Verdict
from patchhub.who import FORMAT

PROGRAM: Final = "ssh-keygen"
_SECONDS: Final = 60.0
_LONGEST: Final = 1 << 16  # characters of a signature: RSA with 16,384 bits takes 6,000
_ARMOUR: Final = re.compile(
    r"-----BEGIN SSH SIGNATURE-----\n([A-Za-z0-9+/=\n]+)\n-----END SSH SIGNATURE-----\n?", re.ASCII
)
_OPTION: Final = re.compile(r'([\w-]+)(?:="([^"]*)")?(?:,|$)')


def namespace(kind: str) -> str:
    """What keeps a signature of one kind from being taken for one of another, or for one of git."""
    return f"patchhub-{kind}"


@dataclass(frozen=True)
class SshKey:
    """A private key as a file, or as a public key whose private one an agent holds.

    Attributes:
        environment: the variables that `ssh-keygen` runs with, such as the agent's socket.
        interactive: somebody is there to be asked for a passphrase; otherwise nothing is asked and nothing waits.
    """

    path: Path
    environment: Mapping[str, str] = field(repr=False)
    interactive: bool = False

    @property
    def method(self) -> str:
        return "ssh"

    def check(self) -> None:
        """Refuse a key that cannot sign, before work is done for it; a key that asks for its passphrase is not tried.

        Raises:
            SettingsError: no such file, no `ssh-keygen`, or a passphrase that nobody can give.
        """
        if not self.path.is_file():
            raise SettingsError(
                f"there is no key {self.path}", remedy="Make one with `ssh-keygen -t ed25519`, or name another."
            )
        if shutil.which(PROGRAM, path=self.environment.get("PATH")) is None:
            raise SettingsError(
                f"{PROGRAM} is not there, which signs with SSH keys", remedy="Install OpenSSH (openssh-client)."
            )
        if not self.interactive:
            self.sign(b"", "check")

    def sign(self, statement: bytes, kind: str) -> tuple[str, str]:
        """(public key, signature) of a statement.

        Raises:
            SettingsError: `ssh-keygen` refuses, in its own words where there are no better ones.
        """
        command = [PROGRAM, "-Y", "sign", "-f", str(self.path), "-n", namespace(kind)]
        quiet = {} if self.interactive else {"SSH_ASKPASS_REQUIRE": "never"}
        try:
            done = subprocess.run(
                command,
                input=statement,
                capture_output=True,
                check=False,
                env={**self.environment, **quiet},
                start_new_session=not self.interactive,  # without a terminal that could be asked
                timeout=None if self.interactive else _SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self._refused(str(error)) from error
        text = done.stdout.decode("ascii", errors="replace")
        if done.returncode != 0 or not text:
            raise self._refused(done.stderr.decode("utf-8", errors="replace"))
        return signing_key(text), text

    def _refused(self, words: str) -> SettingsError:
        """The error for what `ssh-keygen` wrote."""
        if "passphrase" in words:
            return SettingsError(
                f"the key {self.path} is locked by a passphrase, and nobody is there to give it",
                remedy=f"Load it into an agent first: `ssh-add {self.path}`.",
                key=str(self.path),
            )
        if "agent" in words or "No private key" in words:
            return SettingsError(
                f"no agent holds the private key of {self.path}",
                remedy="Load it with `ssh-add`, or name the private key's file.",
                key=str(self.path),
            )
        lines = [line for line in words.strip().splitlines() if not line.startswith("Signing data")]
        said = lines[-1] if lines else "it wrote nothing"
        return SettingsError(
            f"{PROGRAM} cannot sign with {self.path}: {said}", remedy="Name another key.", key=str(self.path)
        )


def is_own(path: Path) -> bool:
    """Whether a file is a key in OpenSSH's own form, which nothing else signs with."""
    try:
        with open(path, "rb") as file:
            return path.suffix == ".pub" or file.readline(_LONGEST).startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    except OSError:
        return False


def signing_key(text: str) -> str:
    """The public key in an armoured signature, as key type and base64.

    Raises:
        ValueError: it is no OpenSSH signature.
    """
    found = _ARMOUR.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise ValueError("it is no OpenSSH signature")
    try:
        data = base64.b64decode(found[1].replace("\n", ""), validate=True)
        (length,) = struct.unpack(">I", data[10:14])
        blob = data[14 : 14 + length]
        (name,) = struct.unpack(">I", blob[:4])
        kind = blob[4 : 4 + name].decode("ascii")
    except (binascii.Error, struct.error, UnicodeDecodeError):
        raise ValueError("it is no OpenSSH signature") from None
    if data[:10] != b"SSHSIG\x00\x00\x00\x01" or len(blob) != length or len(kind) != name:
        raise ValueError("it is no OpenSSH signature")
    return f"{kind} {base64.b64encode(blob).decode()}"


def verify(statement: bytes, kind: str, public_key: str, text: str, time: str, allowed: Path | None) -> Verdict:
    """Check a signature, and whose key it is by.

    Args:
        public_key: whose key it must be.
        time: when it says that it was made, at which the key must have been valid.
        allowed: a file of allowed signers; None: no key is allowed.
    """
    try:
        if signing_key(text) != public_key:
            return Verdict("broken", None, "it is by another key than its note says")
        at = f"-Overify-time={_local(time)}"
    except ValueError as error:
        return Verdict("broken", None, str(error))
    if shutil.which(PROGRAM) is None:
        return Verdict("unchecked", None, f"{PROGRAM} is not there: install OpenSSH (openssh-client)")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "signature"
        file.write_text(text, encoding="ascii")
        reason = ""
        if allowed is not None:
            found, reason = _asked(b"", "find-principals", "-s", str(file), "-f", str(allowed), at)
            for principal in found.splitlines():
                arguments = ("-s", str(file), "-f", str(allowed), "-I", principal, "-n", namespace(kind), at)
                good, reason = _asked(statement, "verify", *arguments)
                if good:
                    return Verdict("good", principal)
        good, why = _asked(statement, "check-novalidate", "-s", str(file), "-n", namespace(kind))
    return Verdict("unknown", None, reason) if good else Verdict("broken", None, why)


def _asked(data: bytes, verb: str, *arguments: str) -> tuple[str, str]:
    """(what `ssh-keygen -Y` answers, nothing where it refuses; why it does)."""
    try:
        done = subprocess.run(
            [PROGRAM, "-Y", verb, *arguments],
            input=data,
            capture_output=True,
            check=False,
            start_new_session=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    said = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
    answer = done.stdout.decode("utf-8", errors="replace").strip()
    return (answer, "") if done.returncode == 0 and answer else ("", said[0] if said else "it does not fit")


def _local(time: str) -> str:
    """An instant of the store as `ssh-keygen` reads it: in local time, which every version takes.

    Raises:
        ValueError: it is so far away that local time has no name for it.
    """
    instant = datetime.strptime(time, FORMAT).replace(tzinfo=timezone.utc)
    try:
        return instant.astimezone().strftime("%Y%m%d%H%M%S")
    except (OverflowError, OSError):
        raise ValueError(f"it is of {time}, which is no time of this world") from None


# --- allowed signers ------------------------------------------------------------------------------------------------


def principal_of(allowed: Path, public_key: str, kind: str, time: str) -> str | None:
    """Who a file of allowed signers says a key belongs to, for keys whose signatures `ssh-keygen` cannot check.

    Certificate authorities are left out. A line whose options are not understood allows nothing.
    """
    for principals, options, key in _lines(allowed.read_text(encoding="utf-8", errors="replace")):
        if key == public_key and _permits(options, kind, time):
            return principals.split(",")[0]
    return None


def authorities_of(allowed: Path, public_key: str, kind: str, time: str) -> list[str]:
    """For whom a file of allowed signers takes the word of an authority with this key: patterns of principals."""
    found: list[str] = []
    for principals, options, key in _lines(allowed.read_text(encoding="utf-8", errors="replace")):
        names = [name for name, _ in _OPTION.findall(options.lower())]
        rest = ",".join(part for part in options.split(",") if part.lower() != "cert-authority")
        if key == public_key and "cert-authority" in names and _permits(rest, kind, time):
            found += principals.split(",")
    return found


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    """(principals, options, key type and base64) of each line: ``ada@example.org namespaces="git" ssh-ed25519 AAAA... comment``."""
    for line in text.splitlines():
        words = re.findall(r'(?:[^\s"]|"[^"]*")+', line.strip())
        if len(words) < 3 or words[0].startswith("#"):
            continue
        with contextlib.suppress(ValueError):
            base64.b64decode(words[2], validate=True)
            if "=" not in words[1] and words[1] != "cert-authority":
                yield words[0].strip('"'), "", f"{words[1]} {words[2]}"
                continue
        if len(words) > 3:
            yield words[0].strip('"'), words[1], f"{words[2]} {words[3]}"


def _permits(options: str, kind: str, time: str) -> bool:
    for name, value in _OPTION.findall(options.lower()):
        if name == "namespaces":
            if not any(fnmatch.fnmatchcase(namespace(kind), pattern) for pattern in value.split(",")):
                return False
        elif name in ("valid-after", "valid-before"):
            bound, instant = _bound(value), datetime.strptime(time, FORMAT).replace(tzinfo=timezone.utc)
            if bound is None or (instant < bound if name == "valid-after" else instant > bound):
                return False
        else:
            return False
    return True


def _bound(text: str) -> datetime | None:
    """``20261121``, ``202611210930`` or ``20261121093000``, in local time, or in UTC with a ``Z``."""
    digits = text.removesuffix("Z")
    for form in ("%Y%m%d", "%Y%m%d%H%M", "%Y%m%d%H%M%S"):
        with contextlib.suppress(ValueError):
            if len(digits) == len(datetime(2026, 1, 1).strftime(form)):
                found = datetime.strptime(digits, form)
                return found.replace(tzinfo=timezone.utc) if text.endswith("Z") else found.astimezone()
    return None
