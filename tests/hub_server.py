"""A Hub in one process: it speaks the part of the Hub's HTTP protocol that pushing and loading a model needs, and keeps what it gets.

Repositories are chains of commits, each a mapping from paths to bytes; large files are in a store of their own by their hash, as git-lfs has
them. Requests can be made to fail. The server is the standard library's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Commit:
    parent: str | None
    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        content = {path: hashlib.sha256(data).hexdigest() for path, data in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([self.parent, self.message, content]).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def history(self, branch: str = "main") -> list[Commit]:
        """The newest first."""
        found, sha = [], self.branches.get(branch)
        while sha is not None:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found

    @property
    def files(self) -> dict[str, bytes]:
        """On the main branch."""
        return self.commits[self.branches["main"]].files


@dataclass
class Failure:
    """What happens to the next `times` requests of this kind in place of an answer; status None breaks the connection."""

    method: str
    path: str
    status: int | None
    times: int


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def blob_id(path: str, data: bytes) -> str:
    """What the Hub knows a file's content by: sha256 of a large file, git's own hash of another."""
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Tokens are those of users; a user may write what is under the user's name, and read that and all that is public."""

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, method: str, path: str, status: int | None, *, times: int = 1) -> None:
        """Let the next requests with this in their path fail."""
        self.failures.append(Failure(method, path, status, times))

    def failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            self.requests.append((method, path))
            for failure in self.failures:
                if failure.times and failure.method == method and failure.path in path:
                    failure.times -= 1
                    return failure
        return None

    def count(self, method: str, path: str) -> int:
        """How many requests of this kind there were."""
        return sum(found == method and path in where for found, where in self.requests)

    def edit(self, name: str, path: str, data: bytes, branch: str = "main") -> None:
        """As a person does on the web site."""
        repository = self.repositories[name]
        parent = repository.branches[branch]
        files = repository.commits[parent].files | {path: data}
        repository.add(branch, Commit(parent, f"Update {path}", files))

    def publish(self, name: str, folder: Path) -> None:
        """A public repository with the files of a folder, or its next commit."""
        repository = self.repositories.setdefault(name, Repository(private=False))
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        repository.add("main", Commit(repository.branches.get("main"), "all", files))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    # The first that matches answers.
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<name>.+)", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/(?P<oid>\w+)", "store"),
        ("POST", r"/large/(?P<oid>\w+)/verify", "verify"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>.+))?", "info"),
        ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (failure := self.server.failure(self.command, path)) is not None:
            if failure.status is None:
                self.close_connection = True
                return
            self.answer(failure.status, {"error": "made to fail"})
            return
        try:
            for method, pattern, name in self.ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        getattr(self, name)(body, **found.groupdict())
                    return
            raise Refused(404, f"no such route: {self.command} {path}")
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer(error.status, {"error": str(error)}, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- Who may do what ----

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def repository(self, name: str, *, write: bool = False) -> Repository:
        owner = name.split("/")[0]
        user, found = self.user, self.server.repositories.get(name)
        if found is None or (found.private and user != owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refused(403 if user else 401, "You don't have the rights to write to this repository")
        return found

    def at(self, repository: Repository, revision: str | None) -> tuple[str, Commit]:
        sha = repository.find(revision or "main")
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # ---- Writing ----

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or self.user
        if owner != self.user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            self.answer(409, answer | {"error": "You already created this model repo"})
            return
        repository = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        repository.add("main", Commit(None, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}))
        self.server.repositories[name] = repository
        self.answer(200, answer)

    def validate(self, body: bytes) -> None:
        if not json.loads(body)["content"].startswith("---\n"):
            raise Refused(400, "no metadata")
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        repository = self.repository(repo, write=True)
        if name in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[name] = self.at(repository, json.loads(body).get("startingPoint"))[0]
        self.answer(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, commit = self.at(self.repository(repo, write=True), revision)
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            oid = blob_id(path, commit.files[path]) if path in commit.files else None
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            url = f"{self.server.url}/large/{wanted['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            is_here = wanted["oid"] in self.server.large
            objects.append(wanted | ({} if is_here else {"actions": actions}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        self.server.large[oid] = body
        self.answer(200, {})

    def verify(self, body: bytes, oid: str) -> None:
        if len(self.server.large.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "not here")
        self.answer(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self.repository(repo, write=True)
        parent, commit = self.at(repository, revision)
        files = dict(commit.files)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Refused(422, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.add(revision, Commit(parent, header["summary"], files))
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    # ---- Reading ----

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        repository = self.repository(repo)
        sha, commit = self.at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.answer(200, {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        _, commit = self.at(self.repository(repo), revision)
        entries = []
        for path, data in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(path, data)}
            if is_large(path):
                entry["lfs"] = {"oid": entry["oid"], "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha, commit = self.at(self.repository(repo), revision)
        headers = {"X-Repo-Commit": sha}
        if path not in commit.files:
            self.answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        data = commit.files[path]
        headers |= {
            "ETag": f'"{blob_id(path, data)}"',
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if is_large(path):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is not None:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[first:], headers)
        else:
            self.answer(200, data, headers)


@contextmanager
def serve(tokens: dict[str, str]) -> Iterator[Hub]:
    """A Hub that is there as long as the block."""
    hub = Hub(tokens)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def serve_this_process(tokens: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub for this process, with a cache and no stored token in `home`: as `HF_ENDPOINT` and its like make it."""
    with serve(tokens) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "hub-cache"),
            "HF_TOKEN_PATH": str(home / "no-token"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
