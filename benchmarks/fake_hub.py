"""The few routes of the Hugging Face Hub that adapters are fetched by, as a WSGI application."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

MINIMAL_ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@dataclass
class FakeRepo:
    """A repository: `commit` makes the files' next version, which is `main` then."""

    readers: frozenset[str] | None = None
    """Tokens that may read it; None: it is public."""
    gated: bool = False
    """Everybody sees the listing, and only the readers get files."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode())
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.revisions[revision] = sha
        return sha


class FakeHub:
    """WSGI application. Weights are LFS files, which come by redirect from another host name."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}

    def add(self, name: str, files: dict[str, bytes] | None = None, **options: Any) -> FakeRepo:
        repo = self.repos[name] = FakeRepo(**options)
        repo.commit(MINIMAL_ADAPTER if files is None else files)
        return repo

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # The raw path, in which the slashes of a revision are escaped.
        parts = environ["RAW_URI"].partition("?")[0].strip("/").split("/")
        parts = [unquote(part) for part in parts]
        token = environ.get("HTTP_AUTHORIZATION", "").removeprefix("Bearer ")
        match parts:
            case ["api", "models", owner, name, "revision", revision]:
                status, headers, body = self._info(f"{owner}/{name}", revision, token)
            case [owner, name, "resolve", commit, *path]:
                port = environ["SERVER_PORT"]
                status, headers, body = self._resolve(
                    f"{owner}/{name}", commit, "/".join(path), token, port
                )
            case ["cdn", owner, name, commit, *path]:
                status, headers, body = 200, {}, self._file(f"{owner}/{name}", commit, path)
            case _:
                status, headers, body = 404, {}, b""
        start = environ.get("HTTP_RANGE", "").removeprefix("bytes=").removesuffix("-")
        if status == 200 and start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[int(start) :]
        if parts[2:3] == ["resolve"] and "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            headers["Content-Encoding"], body = "gzip", gzip.compress(body)
        headers["Content-Length"] = str(len(body))
        start_response(f"{status} Status", list(headers.items()))
        return [body]

    def _info(self, name: str, revision: str, token: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.repos.get(name)
        if repo is None or (
            repo.readers is not None and not repo.gated and token not in repo.readers
        ):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commit = revision if revision in repo.commits else repo.revisions.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        info = {
            "id": name,
            "sha": commit,
            "private": repo.readers is not None and not repo.gated,
            "gated": "manual" if repo.gated else False,
            "siblings": [_sibling(*item) for item in repo.commits[commit].items()],
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _resolve(
        self, name: str, commit: str, path: str, token: str, port: str
    ) -> tuple[int, dict[str, str], bytes]:
        repo = self.repos[name]
        if repo.readers is not None and token not in repo.readers:
            code = "GatedRepo" if repo.gated else "RepoNotFound"
            return 403 if repo.gated else 401, {"X-Error-Code": code}, b""
        if path not in repo.commits[commit]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if path.endswith((".safetensors", ".bin")):
            location = f"http://localhost:{port}/cdn/{name}/{commit}/{path}"
            return 302, {"Location": location, "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit}, repo.commits[commit][path]

    def _file(self, name: str, commit: str, path: list[str]) -> bytes:
        return self.repos[name].commits[commit]["/".join(path)]


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path, "size": len(content)}
    if path.endswith((".safetensors", ".bin")):
        sha256 = hashlib.sha256(content).hexdigest()
        sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
    return sibling
