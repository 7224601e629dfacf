"""A small hub on loopback: repositories with branches and commits, and ways to misbehave.

It answers what the real client asks: info on models and data sets, the file tree, HEAD and GET of files. Files are
redirected to another host name, `localhost`, as the hub redirects to its CDN, which honours ranges. Files may be in a
local xet storage. It identifies the owner of a token, creates repositories and accepts commits, weights through LFS.
"""

import base64
import hashlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Repo:
    """Files by name, at each commit; `refs` are branches and tags."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    is_gated: bool = False
    is_private: bool = False

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Request:
    """A request: its path, the offset of its range, and whether it had a token."""

    method: str
    path: str
    start: int
    has_token: bool


@dataclass
class Hub:
    """The state of the server: its repositories, the requests that it received, and how it is to fail."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    # By a part of the path: statuses to respond with, one per request, before it works.
    statuses: dict[str, list[int]] = field(default_factory=dict)
    # By file: the number of bytes after which to close the connection, one per request.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    # By file: the number of bytes after which to reset the connection, one per request.
    resets: dict[str, list[int]] = field(default_factory=dict)
    # By file: the number of bytes after which to send nothing more, one per request.
    stalls: dict[str, list[int]] = field(default_factory=dict)
    # By file: the length that the hub claims for it.
    claimed_bytes: dict[str, int] = field(default_factory=dict)
    ignores_ranges: bool = False
    # By token: the response of `whoami-v2`. No other token is accepted.
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    # By file in the xet storage: its hash there; and the address of that storage.
    xet_hashes: dict[str, str] = field(default_factory=dict)
    xet_endpoint: str = ""
    # The file whose request moves the branch `main` to the other commit.
    moves_main_at: str | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment variables of a process that uses this hub."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if self.xet_hashes else "1",
        }

    def sent_from(self, file: str) -> list[int]:
        """Return the offsets from which `file` was requested from the CDN, in order."""
        return [
            request.start
            for request in self.requests
            if request.method == "GET" and request.path.startswith("/cdn/") and request.path.endswith(f"/{file}")
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


def store_by_xet(content: bytes, store: Path) -> str:
    """Put `content` into a local xet storage and return its hash there.

    In a process of its own, since only one process can hold such a storage at a time.
    """
    code = (
        "import sys, hf_xet\n"
        "with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:\n"
        "    upload = commit.start_upload_bytes(sys.stdin.buffer.read())\n"
        "print(upload.result().xet_info.hash)\n"
    )
    arguments = [sys.executable, "-c", code, f"local://{store}"]
    return subprocess.run(arguments, input=content, capture_output=True, check=True).stdout.decode().strip()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.requests.append(Request(self.command, path, start, "Authorization" in self.headers))
        for part, statuses in self.hub.statuses.items():
            if part in path and statuses:
                self._send(statuses.pop(0))
                return
        parts = path.strip("/").removeprefix("datasets/").split("/")
        if self.command in {"POST", "PUT"}:
            self._take(parts, self._read_body())
        elif parts == ["api", "whoami-v2"]:
            account = self.hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            self._send(401) if account is None else self._send_json(account)
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["xet-read-token"]:
            self._send(
                200,
                {
                    "X-Xet-Cas-Url": self.hub.xet_endpoint,
                    "X-Xet-Access-Token": "xet",
                    "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
                },
            )
        elif parts[0] == "stall":
            self.hub.stalled.set()
            self.hub.closing.wait()
        elif parts[:2] in (["api", "models"], ["api", "datasets"]):
            self._answer_api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "cdn":
            self._send_content("/".join(parts[1:3]), parts[3], "/".join(parts[4:]), start)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _answer_api(self, name: str, rest: list[str]) -> None:
        if (repo := self.hub.repos.get(name)) is None:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif (commit := repo.resolve(rest[1] if rest else "main")) is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif rest and rest[0] == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": "0"}
                for file, content in repo.commits[commit].items()
            ]
            self._send(200, {}, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": file} for file in repo.commits[commit]]
            info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
            self._send(200, {}, json.dumps(info).encode())

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _take(self, parts: list[str], content: bytes) -> None:
        """Handle a request that writes: a repository, a file or a commit."""
        address = f"http://127.0.0.1:{self.hub.port}"
        if (
            self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.accounts
            and parts[0] != "lfs"
        ):
            self._send(401)
        elif parts == ["api", "validate-yaml"]:
            self._send_json({"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            exists = name in self.hub.repos
            if not exists:
                self.hub.repos[name] = Repo({COMMIT: {}}, is_private=asked.get("visibility") == "private")
            self._send_json({"url": f"{address}/{name}"}, 409 if exists else 200)
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{address}/lfs/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            self._send_json({"transfer": "basic", "objects": objects})
        elif parts[0] == "lfs":
            self.hub.lfs[parts[1]] = content
            self._send(200)
        elif parts[4:5] == ["preupload"]:
            files = [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for path in (one["path"] for one in json.loads(content)["files"])
            ]
            self._send_json({"files": files})
        elif parts[4:5] == ["commit"]:
            name = "/".join(parts[2:4])
            self._commit(self.hub.repos[name], content)
            self._send_json({"commitUrl": f"{address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._send(404)

    def _commit(self, repo: Repo, content: bytes) -> None:
        for line in content.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repo.commits[COMMIT][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repo.commits[COMMIT][value["path"]] = self.hub.lfs[value["oid"]]

    def _send_json(self, value: object, code: int = 200) -> None:
        self._send(code, {}, json.dumps(value).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.hub.repos.get(name)
        commit = repo.resolve(revision) if repo else None
        if repo is None or commit is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound" if repo else "RepoNotFound"})
        elif repo.is_gated:
            self._send(403, {"X-Error-Code": "GatedRepo"})
        elif file not in repo.commits[commit]:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            content = repo.commits[commit][file]
            headers = {
                "ETag": '"a-hash-of-the-redirect"',
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(self.hub.claimed_bytes.get(file, len(content))),
                "X-Repo-Commit": commit,
                "Location": f"http://localhost:{self.hub.port}/cdn/{name}/{commit}/{file}",
            }
            if file in self.hub.xet_hashes:
                route = f"http://127.0.0.1:{self.hub.port}/api/models/{name}/xet-read-token/{commit}"
                headers |= {"X-Xet-Hash": self.hub.xet_hashes[file], "X-Xet-Refresh-Route": route}
            self._send(302, headers)

    def _send_content(self, name: str, commit: str, file: str, start: int) -> None:
        content = self.hub.repos[name].commits[commit][file]
        if file == self.hub.moves_main_at:
            self.hub.repos[name].refs["main"] = OLD_COMMIT
        start = 0 if self.hub.ignores_ranges else start
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cuts, stalls, resets = (by_file.get(file) for by_file in (self.hub.cuts, self.hub.stalls, self.hub.resets))
        end = cuts.pop(0) if cuts else stalls[0] if stalls else resets[0] if resets else len(content)
        self.wfile.write(content[start:end])
        self.wfile.flush()
        if resets:
            resets.pop(0)
            self._reset()
        if stalls:
            stalls.pop(0)
            self.hub.stalled.set()
            self.hub.closing.wait()

    def _reset(self) -> None:
        """Reset the connection, which is an error for its reader."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def _send(self, code: int, headers: dict[str, str] | None = None, content: bytes = b"{}") -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
