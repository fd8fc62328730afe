"""What `minihub` answers to each request of the Hub's client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.remotes.minihub import LFS_SUFFIXES, USER, Hub, Refused, Repo, file_json, git_sha

_CHUNK = 1 << 16
_CDN_HOST = "localhost"  # another origin than 127.0.0.1, so that the client drops its token as it does for the real one


class Dropped(Exception):
    """The connection was cut, by a fault or by the client."""


class Handler(BaseHTTPRequestHandler):
    """One request. `line` is "METHOD /path", `query` its last values, `record` its row in the hub's log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Be silent."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.body_read = False
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.url_path, self.line = url.path, f"{self.command} {url.path}"
        self.record: dict[str, Any] = {"line": self.line, "in": 0, "out": 0, "fault": None, "status": None}
        self.hub.log.append(self.record)
        try:
            self._fail_first()
            self._route([unquote(part) for part in url.path.split("/")[1:]])
        except Refused as refused:
            self.reply(refused.status, refused.body, refused.headers)
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.record["status"] = self.record["status"] or "dropped"
        except Exception as error:  # a gap of minihub itself: be loud
            print("minihub bug", self.line, repr(error), file=sys.stderr)
            self.reply(500, {"error": f"minihub bug: {error!r}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _fail_first(self) -> None:
        if delay := self.hub.take_fault("delay", self.line):
            self.record["fault"] = "delay"
            time.sleep(delay["seconds"])
        if fault := self.hub.take_fault("status", self.line):
            self.record["fault"] = "status"
            raise Refused(fault.get("status", 500), "minihub injected fault", headers=fault.get("headers"))

    # --- the request's body and the answer --------------------------------------------------------------------------

    def chunks(self) -> Iterator[bytes]:
        """The body, of known length or chunked, in pieces; cut where a fault says so."""
        if self.body_read:
            return
        self.body_read, left = True, int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        cut = self.hub.take_fault("drop_upload", self.line) if chunked or left else None
        while chunked or left:
            if chunked and not left:
                left = int(self.rfile.readline().split(b";")[0], 16)
                if not left:
                    self.rfile.readline()
                    return
            most = max(1, cut["after"] - self.record["in"]) if cut else _CHUNK
            piece = self.rfile.read(min(left, _CHUNK, most))
            if not piece:
                raise Dropped
            left -= len(piece)
            self.record["in"] += len(piece)
            if chunked and not left:
                self.rfile.readline()
            if cut and self.record["in"] >= cut["after"]:
                self._reset("drop_upload")
            yield piece

    def json(self) -> Any:
        return json.loads(b"".join(self.chunks()) or b"{}")

    def reply(self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        for _ in self.chunks():  # drain the body, else the client may see a reset in place of the answer
            pass
        if self.hub.take_fault("drop_response", self.line):  # the work is done, the answer is lost
            self.record["fault"] = "drop_response"
            self.connection.shutdown(socket.SHUT_RDWR)
            raise Dropped
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)
            self.record["out"] = len(data)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.record["status"] = status
        self.send_response(status)
        for name, value in {"X-Request-Id": secrets.token_hex(6), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def page(self, items: list[Any]) -> None:
        """One page of a list, with a link to the next."""
        begin, size = int(self.query.get("cursor", 0)), self.hub.page_size
        link = f'<{self.origin()}{self.url_path}?{urlencode({**self.query, "cursor": begin + size})}>; rel="next"'
        self.reply(200, items[begin : begin + size], {"Link": link} if begin + size < len(items) else {})

    def send_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file or the range of it that is asked for, cut or corrupted where a fault says so."""
        size, begin, status = path.stat().st_size, 0, 200
        end = size - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end, status = int(asked[1]), min(int(asked[2] or end), end), 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{end}/{size}"}
        length = {"Content-Length": str(end - begin + 1), "Accept-Ranges": "bytes"}
        self.head(status, {**length, "Content-Type": "application/octet-stream", **headers})
        if self.command == "HEAD":
            return
        corrupt = self.hub.take_fault("corrupt", self.line)
        cut = self.hub.take_fault("drop_download", self.line)
        with open(path, "rb") as file:
            file.seek(begin)
            while (place := file.tell()) <= end:
                piece = bytearray(file.read(min(_CHUNK, end - place + 1)))
                if corrupt and 0 <= (flipped := corrupt.get("offset", 0) - place) < len(piece):
                    self.record["fault"] = "corrupt"
                    piece[flipped] ^= 1
                if cut:
                    piece = piece[: cut["after"] - self.record["out"]]
                self.wfile.write(piece)
                self.record["out"] += len(piece)
                if cut and self.record["out"] >= cut["after"]:
                    self.record["fault"] = "drop_download"
                    self.connection.shutdown(socket.SHUT_RDWR)
                    raise Dropped

    def _reset(self, fault: str) -> None:
        """Cut the connection by RST, so that the client sees a reset and not a half-close."""
        self.record["fault"] = fault
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise Dropped

    def origin(self, host: str | None = None) -> str:
        name, _, port = self.headers.get("Host", "").rpartition(":")
        return f"http://{host or name}:{port}"

    def authorise(self, *, write: bool = False, private: bool = False) -> None:
        """No token where one is needed: as if there were no repository. Unknown token: 401. Read token to write: 403."""
        given = self.headers.get("Authorization")
        if given is None and (write or private):
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        role = self.hub.tokens.get((given or "").removeprefix("Bearer "))
        if given is not None and role is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and role != "write":
            raise Refused(403, "You don't have the required permissions to perform this action (write token needed)")

    # --- routes -----------------------------------------------------------------------------------------------------

    def _route(self, parts: list[str]) -> None:
        if parts[0] in ("_lfs", "_cdn"):  # signed: the client sends no token here
            if self.hub.sign(self.url_path) != f"{self.url_path}?sig={self.query.get('sig', '')}":
                raise Refused(403, "Who does not match")
            if parts[0] == "_cdn":
                self.send_file(self.hub.blob(parts[1]), {"ETag": f'"{parts[1]}"'})
            else:
                self._transfer(parts[1], parts[2:])
        elif parts[:2] == ["api", "validate-yaml"]:
            self.reply(200, {"warnings": [], "errors": []})
        elif parts[:3] == ["api", "repos", "create"]:
            self._create_repo()
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._repo_api("/".join(parts[2:4]), parts[4:])
        elif parts[2:6] == ["info", "lfs", "objects", "batch"]:
            self._lfs_batch(f"{parts[0]}/{parts[1].removesuffix('.git')}")
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            raise Refused(404, f"minihub has no {self.line}")

    def _create_repo(self) -> None:
        self.authorise(write=True)
        body = self.json()
        name = f"{body.get('organization') or USER}/{body['name']}"
        url = f"{self.origin()}/{name}"
        with self.hub.lock:
            if not self.hub.create(name, private=body.get("visibility") == "private"):
                raise Refused(
                    409, "You already created this model repo", url=url
                )  # with exist_ok the client reads "url"
        self.reply(200, {"url": url, "name": name, "id": name})

    def _repo_api(self, name: str, rest: list[str]) -> None:
        operation = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        self.authorise()
        repo = self.hub.load(name)
        changes = self.command in ("POST", "DELETE") and operation != "paths-info"
        self.authorise(write=changes or operation == "xet-write-token", private=repo["private"])
        if operation == "refs":
            self._refs(repo)
        elif operation in ("branch", "tag"):
            self._change_ref(name, operation, revision)
        elif operation == "commit":
            lines = [json.loads(line) for line in b"".join(self.chunks()).split(b"\n") if line.strip()]
            with self.hub.lock:
                self._commit(self.hub.load(name), revision, lines)
        elif operation in ("xet-read-token", "xet-write-token") and self.hub.xet:
            self._xet_token()
        else:
            self._read_api(repo, operation, self.hub.resolve(repo, revision), rest)

    def _read_api(self, repo: Repo, operation: str, sha: str, rest: list[str]) -> None:
        tree = repo["commits"][sha]["tree"]
        if operation == "revision":
            names = [{"rfilename": path} for path in sorted(tree)]
            self.reply(200, {"id": repo["id"], "sha": sha, "private": repo["private"], "tags": [], "siblings": names})
        elif operation == "commits":
            self.page(list(self._history(repo, sha)))
        elif operation == "paths-info":
            asked = parse_qs(b"".join(self.chunks()).decode()).get("paths", [])
            self.reply(200, [file_json(path, tree[path]) for path in asked if path in tree])
        elif operation == "tree":
            folders = {path[:end] for path in tree for end, letter in enumerate(path) if letter == "/"}
            listed: list[dict[str, Any]] = [
                {"type": "directory", "oid": git_sha(b"tree", path.encode()), "size": 0, "path": path}
                for path in sorted(folders)
            ]
            self.page([*listed, *(file_json(path, entry) for path, entry in sorted(tree.items()))])
        elif operation == "preupload":
            self._preupload(tree)
        else:
            raise Refused(404, f"minihub has no {self.line}")

    def _refs(self, repo: Repo) -> None:
        def listed(kind: str, prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": prefix + n, "targetCommit": sha} for n, sha in repo[kind].items()]

        tags = listed("tags", "refs/tags/")
        self.reply(200, {"branches": listed("branches", "refs/heads/"), "tags": tags, "converts": []})

    def _history(self, repo: Repo, sha: str | None) -> Iterator[dict[str, Any]]:
        while sha:
            commit = repo["commits"][sha]
            facts = {key: commit[key] for key in ("title", "message", "date")}
            yield {"id": sha, **facts, "authors": [{"user": commit["author"]}]}
            sha = next(iter(commit["parents"]), None)

    def _preupload(self, tree: Mapping[str, Any]) -> None:
        found = []
        for file in self.json()["files"]:
            path, entry = file["path"], tree.get(file["path"])
            binary = path.rpartition(".")[2] in LFS_SUFFIXES or b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or file["size"] >= self.hub.lfs_threshold else "regular"
            oid = entry and (entry["lfs"] or entry["oid"])
            found.append({"path": path, "uploadMode": mode, "oid": oid, "shouldIgnore": False})
        self.reply(200, {"files": found})

    def _change_ref(self, name: str, operation: str, revision: str) -> None:
        body = self.json() if self.command == "POST" else {}
        kind = "branches" if operation == "branch" else "tags"
        with self.hub.lock:
            repo, ref = self.hub.load(name), body.get("tag", revision)
            if self.command == "POST":
                start = revision if operation == "tag" else body.get("startingPoint", "main")
                target = self.hub.resolve(repo, start)
                if ref in repo[kind]:
                    raise Refused(409, f"Reference {ref} already exists")
                repo[kind][ref] = target
            elif repo[kind].pop(ref, None) is None:
                raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
            self.hub.save(repo)
        self.reply(200, {"success": True})

    def _commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        if branch not in repo["branches"]:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo["branches"][branch]
        if not head.startswith(header.get("parentCommit", "")):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo["commits"][head]["tree"])
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                tree[value["path"]] = self.hub.regular(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                tree[value["path"]] = self.hub.large(value["oid"])
            elif tree.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        made = self.hub.commit(repo, branch, tree, header["summary"], header.get("description", ""))
        url = f"{self.origin()}/{repo['id']}/commit/{made}"
        self.reply(200, {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def _resolve_file(self, name: str, revision: str, path: str) -> None:
        self.authorise()
        repo = self.hub.load(name)
        self.authorise(private=repo["private"])
        sha = self.hub.resolve(repo, revision)
        entry, headers = repo["commits"][sha]["tree"].get(path), {"X-Repo-Commit": sha}
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        headers["Content-Disposition"] = f'inline; filename="{quote(path.rpartition("/")[2])}";'
        if not entry["lfs"]:
            self.send_file(self.hub.blob(entry["oid"]), {**headers, "ETag": f'"{entry["oid"]}"'})
            return
        if entry.get("xet") and self.hub.xet:
            headers["X-Xet-Hash"] = entry["xet"]
            headers["Link"] = f'<{self.origin()}/api/models/{name}/xet-read-token/{sha}>; rel="xet-auth"'
        headers["Location"] = self.origin(_CDN_HOST) + self.hub.sign(f"/_cdn/{entry['lfs']}")
        self.reply(302, b"", {**headers, "X-Linked-Etag": f'"{entry["lfs"]}"', "X-Linked-Size": str(entry["size"])})

    def _xet_token(self) -> None:
        url, expires = f"local://{self.hub.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(expires)}
        self.reply(200, {"casUrl": url, "exp": expires, "accessToken": "x"}, headers)  # one client reads each

    # --- large files ------------------------------------------------------------------------------------------------

    def _lfs_batch(self, name: str) -> None:
        body = self.json()
        self.authorise(write=True, private=self.hub.load(name)["private"])
        multipart = "multipart" in body.get("transfers", []) and self.hub.multipart_threshold is not None
        found, transfer = [], "basic"
        for wanted in body["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            path = f"/_lfs/{wanted['oid']}"
            if not self.hub.blob(wanted["oid"]).exists():  # no "actions" = already there
                upload: dict[str, Any] = {"href": self.origin() + self.hub.sign(path)}
                if multipart and wanted["size"] > (self.hub.multipart_threshold or 0):
                    transfer = "multipart"
                    upload["header"] = self._parts(path, wanted["size"])
                answer["actions"] = {
                    "upload": upload,
                    "verify": {"href": self.origin() + self.hub.sign(f"{path}/verify")},
                }
            found.append(answer)
        self.reply(200, {"transfer": transfer, "objects": found}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _parts(self, path: str, size: int) -> dict[str, str]:
        count = -(-size // self.hub.part_size)
        urls = {str(part): self.origin() + self.hub.sign(f"{path}/{part}") for part in range(1, count + 1)}
        return {"chunk_size": str(self.hub.part_size), **urls}

    def _transfer(self, name: str, rest: list[str]) -> None:
        """PUT of a whole file or of one part; POST to join the parts, or to verify."""
        if rest == ["verify"]:
            if not self.hub.blob(name).exists() or self.hub.blob(name).stat().st_size != self.json()["size"]:
                raise Refused(404, "No such object, or size differs")
            self.reply(200, {"message": "ok"})
            return
        parts = self.hub.root / "parts" / name
        joined = self.command == "POST"
        source = (
            ((parts / str(part["partNumber"])).read_bytes() for part in self.json()["parts"])
            if joined
            else self.chunks()
        )
        digest = hashlib.sha256()
        descriptor, temporary = tempfile.mkstemp(dir=self.hub.root)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for piece in source:
                    file.write(piece)
                    digest.update(piece)
            if not joined and rest:
                parts.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, parts / str(int(rest[0])))
            elif digest.hexdigest() != name:
                raise Refused(400, f"BadDigest: got {digest.hexdigest()}")
            else:
                os.replace(temporary, self.hub.blob(name))
                shutil.rmtree(parts, ignore_errors=True)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self.reply(200, {"success": True} if joined else b"", {"ETag": f'"{digest.hexdigest()}"'})
