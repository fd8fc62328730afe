#!/usr/bin/env python3
"""minihub: a loopback stand-in for the Hugging Face Hub HTTP API (stdlib only; for tests, never expose it).

Blobs lie content-addressed in ROOT/blobs (git sha1 for regular files, sha256 for LFS); commits, branches, tags and
PR refs in ROOT/repos/<type>s/<ns>/<name>.json.  In tests: hub = minihub.start(tmp_path); hub.url, hub.faults, hub.log.
--xet DIR offers Xet on a local:// store (hf_xet writes its xorbs and shards straight into DIR; this process needs
hf_xet too, to rebuild the file).  Control over HTTP: POST /_minihub/faults [..], POST /_minihub/reset, GET /_minihub/log.
A fault is {"kind": status|drop_upload|drop_download|drop_response|corrupt|delay, "match": regex on "METHOD /path", "times": K (-1: for
ever), "status": 500, "headers": {..}, "after": N bytes, "offset": N, "seconds": S}; on the command line
--fault drop_upload:after=1000000 --fault "status:status=429,times=3,match=/preupload/" --fault corrupt:offset=99
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.remotes import minixet

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_EXT = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "onnx",
    "npy",
    "npz",
    "parquet",
    "arrow",
    "gguf",
    "h5",
    "msgpack",
    "zip",
    "tar",
    "gz",
    "7z",
    "pkl",
]
ATTRS = "".join(f"*.{e} filter=lfs diff=lfs merge=lfs -text\n" for e in LFS_EXT).encode()
DEFAULT_MATCH = {
    "drop_upload": "^PUT /_lfs/",
    "drop_download": "^GET .*/(resolve|_cdn)/",
    "corrupt": "^GET .*/(resolve|_cdn)/",
}


def now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_sha(b):
    return hashlib.sha1(b"blob %d\0" % len(b) + b).hexdigest()


def pointer(oid, n):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {n}\n".encode()


class Err(Exception):
    def __init__(self, status, msg, code=None, headers=None, **body):
        self.status, self.body = status, {"error": msg, **body}
        self.headers = {"X-Error-Message": msg, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Dropped(Exception):
    """The connection was cut, by a fault or by the client."""


class Hub:
    def __init__(
        self,
        root,
        user="tester",
        write_token="hf_write",
        read_token="hf_read",
        require_token=False,
        xet=None,
        lfs_threshold=10 << 20,
        multipart_threshold=None,
        part_size=5 << 20,
        page_size=1000,
        cdn_host="localhost",
        faults=(),
    ):
        self.root, self.user, self.require_token, self.xet = (
            Path(root),
            user,
            require_token,
            xet and Path(xet).absolute(),
        )
        self.tokens = {write_token: "write", read_token: "read"}
        self.lfs_threshold, self.multipart, self.part_size = lfs_threshold, multipart_threshold, part_size
        self.page_size, self.cdn_host, self.secret = page_size, cdn_host, os.urandom(16)
        self.faults, self.log, self.lock = [dict(f) for f in faults], [], threading.RLock()
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    def blob(self, oid):
        return self.root / "blobs" / oid

    def write(self, path, data):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        os.replace(tmp, path)

    def repo_path(self, typ, rid):
        return self.root / "repos" / (typ + "s") / (rid + ".json")

    def load(self, typ, rid):
        if not self.repo_path(typ, rid).is_file():
            raise Err(404, "Repository not found", "RepoNotFound")
        return json.loads(self.repo_path(typ, rid).read_text())

    def save(self, r):
        self.write(self.repo_path(r["type"], r["id"]), json.dumps(r).encode())

    def commit(self, r, kind, ref, tree, title, message="", author=None):
        parents = [r[kind][ref]] if ref in r[kind] else []
        c = {
            "parents": parents,
            "title": title,
            "message": message,
            "date": now(),
            "author": author or self.user,
            "tree": tree,
        }
        oid = hashlib.sha1(json.dumps([c, time.time_ns()], sort_keys=True).encode()).hexdigest()
        r["commits"][oid], r[kind][ref] = c, oid
        self.save(r)
        return oid

    def regular(self, data):
        self.write(self.blob(git_sha(data)), data)
        return {"oid": git_sha(data), "size": len(data), "lfs": None}

    def lfs(self, sha256):
        xet = minixet.materialize(self.xet, sha256, self.blob(sha256)) if self.xet else None
        if not self.blob(sha256).exists():
            raise Err(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist.")
        size = self.blob(sha256).stat().st_size
        return {"oid": git_sha(pointer(sha256, size)), "size": size, "lfs": sha256, "xet": xet}

    def resolve(self, r, rev):
        rev = rev.removeprefix("refs/heads/")
        for kind in ("branches", "tags", "prs"):
            if rev in r[kind]:
                return r[kind][rev]
        hits = [c for c in r["commits"] if c.startswith(rev)] if re.fullmatch(r"[0-9a-f]{7,40}", rev) else []
        if len(hits) != 1:
            raise Err(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return hits[0]

    def sign(self, path):
        return path + "?sig=" + hmac.new(self.secret, path.encode(), "sha256").hexdigest()[:32]

    def take_fault(self, kind, line):
        with self.lock:
            for f in self.faults:
                left = f.setdefault("times", 1)
                if f["kind"] == kind and left and re.search(f.get("match", DEFAULT_MATCH.get(kind, "")), line):
                    f["times"] = left - 1 if left > 0 else -1
                    return f
        return None


def file_json(path, e, sibling=False, commit=None):
    lfs = (
        {"sha256" if sibling else "oid": e["lfs"], "size": e["size"], "pointerSize": len(pointer(e["lfs"], e["size"]))}
        if e["lfs"]
        else None
    )
    out = (
        {"rfilename": path, "size": e["size"], "blobId": e["oid"]}
        if sibling
        else {"type": "file", "path": path, "size": e["size"], "oid": e["oid"]}
    )
    return {
        **out,
        **({"lfs": lfs} if lfs else {}),
        **({"xetHash": e["xet"]} if e.get("xet") else {}),
        **({"lastCommit": commit} if commit else {}),
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version, server_version, disable_nagle_algorithm, hub = "HTTP/1.1", "minihub/1", True, None

    def log_message(*a):
        return None

    def handle_any(self):
        hub, self.body_done, u = self.hub, False, urlsplit(self.path)
        self.q, self.upath, self.line = (
            {k: v[-1] for k, v in parse_qs(u.query).items()},
            u.path,
            f"{self.command} {u.path}",
        )
        self.rec = {
            "line": self.line,
            "q": u.query,
            "auth": "Authorization" in self.headers,
            "range": self.headers.get("Range"),
            "in": 0,
            "out": 0,
            "fault": None,
            "status": None,
        }
        if not u.path.startswith("/_minihub"):
            hub.log.append(self.rec)
        try:
            if f := hub.take_fault("delay", self.line):
                self.rec["fault"] = time.sleep(f["seconds"]) or "delay"
            if f := hub.take_fault("status", self.line):
                self.rec["fault"] = "status"
                raise Err(f.get("status", 500), "minihub injected fault", headers=f.get("headers"))
            self.route([unquote(x) for x in u.path.split("/")[1:]])
        except Err as e:
            self.reply(e.status, e.body, e.headers)
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self.close_connection, self.rec["status"] = True, self.rec["status"] or "dropped"
        except Exception as e:  # a bug or gap of minihub itself: be loud
            self.reply(500, {"error": f"minihub bug: {e!r}"}, print("minihub bug", self.line, repr(e), file=sys.stderr))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def chunks(self):
        """The request body (Content-Length or chunked) in pieces of at most 64 KiB; honours drop_upload."""
        if self.body_done:
            return
        self.body_done, left = True, int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        fault = self.hub.take_fault("drop_upload", self.line) if chunked or left else None
        while chunked or left:
            if chunked and not left and not (left := int(self.rfile.readline().split(b";")[0], 16)):
                self.rfile.readline()
                return
            b = self.rfile.read(min(left, 1 << 16, max(1, fault["after"] - self.rec["in"]) if fault else 1 << 16))
            if not b:
                raise Dropped
            left, self.rec["in"] = left - len(b), self.rec["in"] + len(b)
            if chunked and not left:
                self.rfile.readline()
            if fault and self.rec["in"] >= fault["after"]:
                self.rec["fault"] = "drop_upload"  # RST, so that the client sees a reset, not a half-close
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                raise Dropped
            yield b

    def json(self):
        return json.loads(b"".join(self.chunks()) or b"{}")

    def reply(self, status, body=b"", headers=None, ctype="application/json"):
        for _ in self.chunks():
            pass  # drain the body, else keep-alive breaks and the client may see a reset in place of our answer
        if self.hub.take_fault("drop_response", self.line):  # the work is done, the answer is lost
            raise Dropped(self.rec.update(fault="drop_response"), self.connection.shutdown(socket.SHUT_RDWR))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, {"Content-Type": ctype, "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)
            self.rec["out"] = len(data)

    def head(self, status, headers):
        self.rec["status"] = status
        self.send_response(status)
        for k, v in {"X-Request-Id": secrets.token_hex(6), **headers}.items():
            self.send_header(k, v)
        self.end_headers()

    def send_file(self, path, headers):
        size, start, status = path.stat().st_size, 0, 200
        end = size - 1
        if (m := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")) and m[0] != "bytes=-":
            start, end = (int(m[1]), min(int(m[2] or end), end)) if m[1] else (max(0, size - int(m[2])), end)
            if start >= size:
                raise Err(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        self.head(
            status,
            {
                "Content-Length": str(end - start + 1),
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
                **headers,
            },
        )
        if self.command == "HEAD":
            return
        bad, cut = self.hub.take_fault("corrupt", self.line), self.hub.take_fault("drop_download", self.line)
        with open(path, "rb") as f:
            f.seek(start)
            while (pos := f.tell()) <= end:
                b = f.read(min(1 << 16, end - pos + 1))
                if bad and 0 <= (i := bad.get("offset", 0) - pos) < len(b):
                    b, self.rec["fault"] = b[:i] + bytes([b[i] ^ 1]) + b[i + 1 :], "corrupt"
                b = b[: cut["after"] - self.rec["out"]] if cut else b
                self.wfile.write(b)
                self.rec["out"] += len(b)
                if cut and self.rec["out"] >= cut["after"]:
                    self.rec["fault"] = "drop_download"
                    self.connection.shutdown(socket.SHUT_RDWR)
                    raise Dropped

    def base(self, host=None):
        h = self.headers.get("Host", "")
        return f"http://{host or h.rsplit(':', 1)[0]}:{h.rsplit(':', 1)[-1]}"

    def repo_url(self, typ, rid):
        return self.base() + "/" + ("" if typ == "model" else typ + "s/") + rid

    def auth(self, write=False, private=False):
        """No token: 401 RepoNotFound where one is needed.  Unknown token: always 401.  Read token on a write: 403."""
        h = self.headers.get("Authorization")
        if h is None and (write or private or self.hub.require_token):
            raise Err(401, "Invalid username or password.", "RepoNotFound")
        if h is None:
            return None
        role = self.hub.tokens.get(h.removeprefix("Bearer "))
        if role is None:
            raise Err(401, "Invalid credentials in Authorization header")
        if write and role != "write":
            raise Err(403, "You don't have the required permissions to perform this action (write token needed)")
        return role

    def route(self, s):
        hub = self.hub
        if s[0] == "_minihub":
            if s[1] == "log":
                return self.reply(200, hub.log)
            hub.faults, hub.log = (self.json(), hub.log) if s[1] == "faults" else ([], [])
            return self.reply(200, hub.faults)
        if s[0] in ("_lfs", "_cdn"):  # "presigned" URLs: the client sends no token here
            if hub.sign(self.upath) != f"{self.upath}?sig={self.q.get('sig', '')}":
                raise Err(403, "Signature does not match")
            return self.send_file(hub.blob(s[1]), {"ETag": f'"{s[1]}"'}) if s[0] == "_cdn" else self.lfs_transfer(s)
        if s[:2] == ["api", "whoami-v2"]:
            role = self.auth(private=True)
            return self.reply(
                200,
                {
                    "type": "user",
                    "id": "0",
                    "name": hub.user,
                    "fullname": hub.user,
                    "orgs": [],
                    "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}},
                },
            )
        if s[:2] == ["api", "agent-harnesses"]:
            return self.reply(200, {"standardEnvVars": [], "harnesses": {}})
        if s[:2] == ["api", "validate-yaml"]:
            return self.reply(200, {"warnings": [], "errors": []})
        if s[:2] == ["api", "repos"]:
            return self.repos(s[2])
        if s[0] == "api" and len(s) >= 4 and s[1] in TYPES:
            return self.repo_api(TYPES[s[1]], "/".join(s[2:4]), s[4:])
        typ, t = (TYPES[s[0]], s[1:]) if s[0] in TYPES else ("model", s)
        if len(t) > 4 and t[2] == "resolve" and self.command in ("GET", "HEAD"):
            return self.resolve_file(typ, "/".join(t[:2]), t[3], "/".join(t[4:]))
        if t[2:] == ["info", "lfs", "objects", "batch"] and t[1].endswith(".git"):
            return self.lfs_batch(typ, "/".join(t[:2])[:-4])
        raise Err(404, f"minihub has no {self.line}")

    def repos(self, what):
        self.auth(write=True)
        hub, b = self.hub, self.json()
        typ, rid = b.get("type") or "model", f"{b.get('organization') or self.hub.user}/{b['name']}"
        url = self.repo_url(typ, rid)
        with hub.lock:
            if what == "create":
                if hub.repo_path(typ, rid).exists():
                    raise Err(
                        409, f"You already created this {typ} repo", url=url
                    )  # with exist_ok the client reads this "url"
                r = {
                    "id": rid,
                    "type": typ,
                    "private": b.get("visibility") == "private",
                    "created": now(),
                    "branches": {},
                    "tags": {},
                    "prs": {},
                    "commits": {},
                }
                hub.commit(
                    r, "branches", "main", {".gitattributes": hub.regular(ATTRS)}, "initial commit", author="system"
                )
                return self.reply(200, {"url": url, "name": rid, "id": rid})
            hub.load(typ, rid)
            if what == "delete":
                hub.repo_path(typ, rid).unlink()
                return self.reply(200, b"OK", ctype="text/plain")
        raise Err(404, f"minihub has no {self.line}")

    def repo_api(self, typ, rid, rest):
        hub, m, op, rev = self.hub, self.command, ([*rest, None])[0], rest[1] if len(rest) > 1 else "main"
        self.auth()
        r = hub.load(typ, rid)
        self.auth(
            write=(m in ("POST", "DELETE") and op != "paths-info") or op == "xet-write-token", private=r["private"]
        )
        if op in (None, "revision", "commits", "tree", "paths-info", "preupload"):
            sha = hub.resolve(r, rev)
            c = r["commits"][sha]
            tree = c["tree"]
        if op in (None, "revision") and m == "GET":
            sib = [
                file_json(p, e, sibling=True) if "blobs" in self.q else {"rfilename": p}
                for p, e in sorted(tree.items())
            ]
            return self.reply(
                200,
                {
                    "_id": "0" * 24,
                    "id": rid,
                    "modelId": rid,
                    "author": rid.split("/")[0],
                    "sha": sha,
                    "tags": [],
                    "private": r["private"],
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "siblings": sib,
                    "createdAt": r["created"],
                    "lastModified": c["date"],
                },
            )
        if op == "refs":

            def ref(k, pre):
                return [{"name": n, "ref": pre + n, "targetCommit": o} for n, o in r[k].items()]

            prs = {"pullRequests": ref("prs", "")} if "include_prs" in self.q else {}
            return self.reply(
                200,
                {"branches": ref("branches", "refs/heads/"), "tags": ref("tags", "refs/tags/"), "converts": [], **prs},
            )
        if op == "commits":
            out = []
            while sha:
                c = r["commits"][sha]
                out.append(
                    {"id": sha, **{k: c[k] for k in ("title", "message", "date")}, "authors": [{"user": c["author"]}]}
                )
                sha = (c["parents"] or [None])[0]
            return self.page(out)
        if op == "paths-info":
            return self.reply(
                200,
                [
                    file_json(p, tree[p])
                    for p in parse_qs(b"".join(self.chunks()).decode()).get("paths", [])
                    if p in tree
                ],
            )
        if op == "tree":
            base, deep = (rest[2].strip("/") + "/" if len(rest) > 2 else ""), self.q.get("recursive") == "true"
            last = {"id": sha, "title": c["title"], "date": c["date"]} if self.q.get("expand") == "true" else None
            sub = {p[len(base) :]: e for p, e in sorted(tree.items()) if p.startswith(base)}
            if base and not sub:
                raise Err(404, f'{base} does not exist on "{rev}"', "EntryNotFound")
            dirs = {p[:i] for p in sub for i, ch in enumerate(p) if ch == "/" and (deep or "/" not in p[:i])}
            return self.page(
                [{"type": "directory", "oid": git_sha(d.encode()), "size": 0, "path": base + d} for d in sorted(dirs)]
                + [file_json(base + p, e, commit=last) for p, e in sub.items() if deep or "/" not in p]
            )
        if op in ("xet-read-token", "xet-write-token") and hub.xet:
            url, exp = (
                f"local://{hub.xet}",
                int(time.time()) + 3600,
            )  # hf_xet reads the JSON, huggingface_hub the headers
            return self.reply(
                200,
                {"casUrl": url, "exp": exp, "accessToken": "x"},
                {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(exp)},
            )
        if op == "preupload" and m == "POST":
            body, out = self.json(), []
            ign = [g.strip() for g in body.get("gitIgnore", "").splitlines() if g.strip()[:1] not in ("", "#")]
            for f in body["files"]:
                p, e = f["path"], tree.get(f["path"])
                big = (
                    f["size"] >= hub.lfs_threshold
                    or p.rsplit(".", 1)[-1] in LFS_EXT
                    or b"\0" in base64.b64decode(f["sample"])
                )
                out.append(
                    {
                        "path": p,
                        "uploadMode": "lfs" if big else "regular",
                        "oid": e and (e["lfs"] or e["oid"]),
                        "shouldIgnore": any(fnmatch(p, g) or fnmatch(p.rsplit("/", 1)[-1], g) for g in ign),
                    }
                )
            return self.reply(200, {"files": out})
        if op == "commit" and m == "POST":
            lines = [json.loads(x) for x in b"".join(self.chunks()).split(b"\n") if x.strip()]
            with hub.lock:
                return self.do_commit(hub.load(typ, rid), rev, lines)
        if op in ("branch", "tag"):
            body, kind = self.json() if m == "POST" else {}, "branches" if op == "branch" else "tags"
            with hub.lock:
                r, name = hub.load(typ, rid), body.get("tag", rev)
                if m == "POST":
                    target = hub.resolve(r, rev if op == "tag" else body.get("startingPoint", "main"))
                    if name in r[kind]:
                        raise Err(409, f"Reference {name} already exists")
                    r[kind][name] = target
                elif op == "branch" and name == "main":
                    raise Err(403, "Cannot delete the main branch")
                elif r[kind].pop(name, None) is None:
                    raise Err(404, f"Invalid rev id: {name}", "RevisionNotFound")
                hub.save(r)
            return self.reply(200, {"success": True})
        raise Err(404, f"minihub has no {self.line}")

    def page(self, items):
        i, n = int(self.q.get("cursor", 0)), self.hub.page_size
        nxt = f'<{self.base()}{self.upath}?{urlencode({**self.q, "cursor": i + n})}>; rel="next"'
        self.reply(200, items[i : i + n], {"Link": nxt} if i + n < len(items) else {})

    def do_commit(self, r, rev, lines):
        hub, kind, hdr = self.hub, "prs" if rev in r["prs"] else "branches", lines[0]["value"]
        if rev not in r[kind]:
            raise Err(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        head = r[kind][rev]
        if hdr.get("parentCommit") and not head.startswith(hdr["parentCommit"]):
            raise Err(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(r["commits"][head]["tree"])
        for op in lines[1:]:
            k, v = op["key"], op["value"]
            if k == "file":
                tree[v["path"]] = hub.regular(base64.b64decode(v["content"]))
            elif k == "lfsFile":
                tree[v["path"]] = hub.lfs(v["oid"])
            else:
                n, folder = len(tree), v["path"].rstrip("/") + "/" if k == "deletedFolder" else "\0"
                tree = {p: e for p, e in tree.items() if p != v["path"] and not p.startswith(folder)}
                if len(tree) == n:
                    raise Err(404, "A file with this name doesn't exist", "EntryNotFound")
        pr, url = {}, self.repo_url(r["type"], r["id"])
        if self.q.get("create_pr"):
            n = len(r["prs"]) + 1
            kind, rev, pr = "prs", f"refs/pr/{n}", {"pullRequestUrl": f"{url}/discussions/{n}"}
            r["prs"][rev] = head
        oid = hub.commit(r, kind, rev, tree, hdr["summary"], hdr.get("description", ""))
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": "", **pr})

    def resolve_file(self, typ, rid, rev, path):
        self.auth()
        r = self.hub.load(typ, rid)
        self.auth(private=r["private"])
        sha = self.hub.resolve(r, rev)
        e, h = r["commits"][sha]["tree"].get(path), {"X-Repo-Commit": sha}
        if e is None:
            raise Err(404, "Entry not found", "EntryNotFound", h)
        h["Content-Disposition"] = f'inline; filename="{quote(path.rsplit("/", 1)[-1])}";'
        if not e["lfs"]:
            return self.send_file(self.hub.blob(e["oid"]), {**h, "ETag": f'"{e["oid"]}"'})
        if e.get("xet") and self.hub.xet:
            h.update(
                {
                    "X-Xet-Hash": e["xet"],
                    "Link": f'<{self.base()}/api/{typ}s/{rid}/xet-read-token/{sha}>; rel="xet-auth"',
                }
            )
        self.reply(
            302,
            b"",
            {
                **h,
                "Location": self.base(self.hub.cdn_host) + self.hub.sign(f"/_cdn/{e['lfs']}"),
                "X-Linked-Etag": f'"{e["lfs"]}"',
                "X-Linked-Size": str(e["size"]),
            },
        )
        return None

    def lfs_batch(self, typ, rid):
        hub, body, out, transfer = self.hub, self.json(), [], "basic"
        self.auth(write=body.get("operation") == "upload", private=hub.load(typ, rid)["private"])
        for o in body["objects"]:
            d, path = {"oid": o["oid"], "size": o["size"], "authenticated": True}, f"/_lfs/{o['oid']}"
            if not re.fullmatch(r"[0-9a-f]{64}", o["oid"]):
                d["error"] = {"code": 422, "message": "bad oid"}
            elif not hub.blob(o["oid"]).exists():  # no "actions" = already there
                up = {"href": self.base() + hub.sign(path)}
                if hub.multipart is not None and o["size"] > hub.multipart and "multipart" in body.get("transfers", []):
                    transfer, n = "multipart", -(-o["size"] // hub.part_size)
                    up["header"] = {
                        "chunk_size": str(hub.part_size),
                        **{str(i): self.base() + hub.sign(f"{path}/{i}") for i in range(1, n + 1)},
                    }
                d["actions"] = {"upload": up, "verify": {"href": self.base() + hub.sign(path + "/verify")}}
            out.append(d)
        self.reply(200, {"transfer": transfer, "objects": out}, ctype="application/vnd.git-lfs+json")

    def lfs_transfer(self, s):
        hub, oid, parts = self.hub, s[1], self.hub.root / "parts" / s[1]
        if s[2:] == ["verify"]:
            if not hub.blob(oid).exists() or hub.blob(oid).stat().st_size != self.json()["size"]:
                raise Err(404, "No such object, or size differs")
            return self.reply(200, {"message": "ok"})
        h, md5 = hashlib.sha256(), hashlib.md5()
        fd, tmp = tempfile.mkstemp(dir=hub.root)
        try:
            with os.fdopen(
                fd, "wb"
            ) as f:  # PUT: a whole file or one part; POST: completion, {"oid", "parts": [{partNumber, etag}]}
                for b in (
                    self.chunks()
                    if self.command == "PUT"
                    else ((parts / str(p["partNumber"])).read_bytes() for p in self.json()["parts"])
                ):
                    f.write(b)
                    h.update(b)
                    md5.update(b)
            if self.command == "PUT" and s[2:]:
                parts.mkdir(parents=True, exist_ok=True)
                os.replace(tmp, parts / str(int(s[2])))
            elif h.hexdigest() != oid:
                raise Err(400, f"BadDigest: got {h.hexdigest()}")
            else:
                os.replace(tmp, hub.blob(oid))
                shutil.rmtree(parts, ignore_errors=True)
        finally:
            Path(tmp).unlink(missing_ok=True)
        self.reply(200, b"" if self.command == "PUT" else {"success": True}, {"ETag": f'"{md5.hexdigest()}"'})
        return None


def start(root, port=0, **kw):
    """Serve on 127.0.0.1 from a daemon thread; returns the Hub, with .url, .faults, .log and .stop()."""
    hub = Hub(root, **kw)
    srv = ThreadingHTTPServer(("127.0.0.1", port), type("H", (Handler,), {"hub": hub}))
    srv.daemon_threads, hub.url = True, f"http://127.0.0.1:{srv.server_address[1]}"
    hub.stop = lambda: (srv.shutdown(), srv.server_close())
    threading.Thread(target=srv.serve_forever, args=(0.05,), daemon=True).start()
    return hub


def parse_fault(text):
    kind, _, rest = text.partition(":")
    f = {"kind": kind, **dict(kv.split("=", 1) for kv in rest.split(",") if kv)}
    ra = f.pop("retry_after", None)
    return {
        **{k: v if k in ("kind", "match") else float(v) if k == "seconds" else int(v) for k, v in f.items()},
        "headers": {"Retry-After": ra} if ra else {},
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True)
    for name, typ, default in (
        ("port", int, 0),
        ("user", str, "tester"),
        ("write-token", str, "hf_write"),
        ("read-token", str, "hf_read"),
        ("xet", str, None),
        ("cdn-host", str, "localhost"),
        ("lfs-threshold", int, 10 << 20),
        ("multipart-threshold", int, None),
        ("part-size", int, 5 << 20),
        ("page-size", int, 1000),
    ):
        p.add_argument("--" + name, type=typ, default=default)
    p.add_argument("--require-token", action="store_true", help="reads of public repos need a token too")
    p.add_argument("--fault", type=parse_fault, action="append", dest="faults", default=[], metavar="KIND:k=v,...")
    print(start(**vars(p.parse_args())).url, flush=True)
    threading.Event().wait()
