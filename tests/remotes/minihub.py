"""A stand-in for the Hugging Face Hub on this machine, for tests: its repositories, and the faults it is told to make.

    hub = minihub.start(folder)          # hub.url, hub.faults, hub.log, hub.stop()

Blobs lie in ``folder/blobs`` under their git SHA-1 (regular files) or SHA-256 (LFS); each repository is one JSON file
with its branches, tags and commits. With ``xet=FOLDER`` it offers Xet on the client's own ``local://`` store.

A fault is a dict in ``hub.faults``:

    kind      status, drop_upload, drop_download, drop_response, corrupt or delay
    match     regular expression on "METHOD /path"; each kind has a default
    times     how often it happens; 1 if not given, -1: always
    status, headers       of the answer to give instead (kind ``status``)
    after     bytes before the connection is cut (``drop_*``)
    offset    which byte arrives with a flipped bit (``corrupt``)
    seconds   how long to wait first (``delay``)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.remotes import minixet

WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"
USER = "tester"
LFS_SUFFIXES = ("safetensors", "bin", "npz", "onnx", "pt", "zip", "tar", "gz")

_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
_DEFAULT_MATCH = {
    "drop_upload": "^PUT /_lfs/",
    "drop_download": "^GET .*/(resolve|_cdn)/",
    "corrupt": "^GET .*/(resolve|_cdn)/",
}

Entry = dict[str, Any]
"""A file in a tree: its git ``oid``, its ``size``, its ``lfs`` SHA-256 or None, perhaps its ``xet`` hash."""
Repo = dict[str, Any]
"""id, private, created, branches and tags (name -> commit), commits (id -> parents, title, message, date, author, tree)."""


class Refused(Exception):
    """An answer other than 2xx, in the form in which the Hub gives it."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, **body: str
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Hub:
    """Blobs and repositories in a folder, the faults that wait, and a record of every request."""

    url: str

    def __init__(
        self,
        root: Path,
        *,
        xet: Path | None = None,
        lfs_threshold: int = 10 << 20,
        multipart_threshold: int | None = None,
        part_size: int = 5 << 20,
        page_size: int = 1000,
    ) -> None:
        self.root, self.xet = Path(root), xet
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.lfs_threshold, self.multipart_threshold = lfs_threshold, multipart_threshold
        self.part_size, self.page_size = part_size, page_size
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self._secret = os.urandom(16)
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Stop answering; replaced by `start`."""

    # --- blobs ------------------------------------------------------------------------------------------------------

    def blob(self, name: str) -> Path:
        return self.root / "blobs" / name

    def regular(self, data: bytes) -> Entry:
        """Keep the content of a file that is no LFS file."""
        name = git_sha(b"blob", data)
        _write(self.blob(name), data)
        return {"oid": name, "size": len(data), "lfs": None}

    def large(self, sha256: str) -> Entry:
        """The entry of an LFS file whose content was uploaded before."""
        xet = minixet.materialize(self.xet, sha256, self.blob(sha256)) if self.xet else None
        if not self.blob(sha256).exists():
            raise Refused(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist.")
        size = self.blob(sha256).stat().st_size
        return {"oid": git_sha(b"blob", pointer(sha256, size)), "size": size, "lfs": sha256, "xet": xet}

    def sign(self, path: str) -> str:
        """A path that needs no token."""
        return f"{path}?sig={hmac.new(self._secret, path.encode(), 'sha256').hexdigest()[:32]}"

    # --- repositories -----------------------------------------------------------------------------------------------

    def load(self, name: str) -> Repo:
        path = self._repo_path(name)
        if not path.is_file():
            raise Refused(404, "Store not found", "RepoNotFound")
        found: Repo = json.loads(path.read_text())
        return found

    def save(self, repo: Repo) -> None:
        _write(self._repo_path(repo["id"]), json.dumps(repo).encode())

    def create(self, name: str, *, private: bool) -> bool:
        """Make a repository with the Hub's own first commit; False if it is there."""
        if self._repo_path(name).exists():
            return False
        repo: Repo = {"id": name, "private": private, "created": now(), "branches": {}, "tags": {}, "commits": {}}
        self.commit(repo, "main", {".gitattributes": self.regular(_ATTRIBUTES)}, "initial commit")
        return True

    def commit(self, repo: Repo, branch: str, tree: dict[str, Entry], title: str, message: str = "") -> str:
        parents = [repo["branches"][branch]] if branch in repo["branches"] else []
        made = {"parents": parents, "title": title, "message": message, "date": now(), "author": USER, "tree": tree}
        name = hashlib.sha1(json.dumps([made, time.time_ns()], sort_keys=True).encode()).hexdigest()
        repo["commits"][name] = made
        repo["branches"][branch] = name
        self.save(repo)
        return name

    def resolve(self, repo: Repo, revision: str) -> str:
        """The commit that a branch, a tag or the beginning of a commit's name stands for."""
        for kind in ("branches", "tags"):
            if revision in repo[kind]:
                return str(repo[kind][revision])
        named = re.fullmatch(r"[0-9a-f]{7,40}", revision) is not None
        hits = [name for name in repo["commits"] if named and name.startswith(revision)]
        if len(hits) != 1:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return str(hits[0])

    def _repo_path(self, name: str) -> Path:
        return self.root / "repos" / "models" / f"{name}.json"

    # --- faults -----------------------------------------------------------------------------------------------------

    def take_fault(self, kind: str, line: str) -> dict[str, Any] | None:
        """The first waiting fault of a kind that a request meets; it is used up by that."""
        with self.lock:
            for fault in self.faults:
                left = fault.setdefault("times", 1)
                if fault["kind"] == kind and left and re.search(fault.get("match", _DEFAULT_MATCH.get(kind, "")), line):
                    fault["times"] = left - 1 if left > 0 else -1
                    return fault
        return None


def start(root: Path, **options: Any) -> Hub:
    """Serve on 127.0.0.1 from a daemon thread until ``stop()``."""
    from tests.remotes.minihub_http import Handler

    hub = Hub(root, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"

    def stop() -> None:
        server.shutdown()
        server.server_close()

    hub.stop = stop  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return hub


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_sha(kind: bytes, data: bytes) -> str:
    return hashlib.sha1(kind + b" %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def file_json(path: str, entry: Entry) -> dict[str, Any]:
    """A file as the Hub lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["lfs"]:
        size = len(pointer(entry["lfs"], entry["size"]))
        found["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": size}
    if entry.get("xet"):
        found["xetHash"] = entry["xet"]
    return found


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
