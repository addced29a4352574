"""A hub that holds one repository in memory and speaks as much of the hub's HTTP as a push asks."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

SHA = "c" * 40


@dataclass
class FakeHub:
    """One repository, what was asked of it, and what it answers."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of each branch; a repository without any is not there."""
    private: bool = False
    refuse: int = 0
    """Status that every commit is answered with, if not 0."""
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""
    parent: str | None = None
    """Commit that the last push was to follow on."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        self.asked.append(f"{method} {path}")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            self.files["main"] = {}
            asked = json.loads(body)
            # releases of the client spell it in two ways
            self.private = asked.get("private") is True or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/owner/name"}
        found = re.fullmatch(r"/api/models/owner/name(?:/(\w+)/(\w+))?", path)
        if found is None or not self.files:
            return 404, {"error": "RepoNotFound"}
        what, revision = found[1], found[2] or "main"
        if what == "branch":
            self.files.setdefault(revision, dict(self.files["main"]))
            return 200, {}
        if revision not in self.files:
            return 404, {"error": "RevisionNotFound"}
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if what == "commit":
            return self._commit(revision, body)
        return 200, self._info(revision)

    def _commit(self, revision: str, body: bytes) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse, {"error": "You may not"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.parent = line["value"].get("parentCommit")
            else:
                content = base64.b64decode(line["value"]["content"])
                self.files[revision][line["value"]["path"]] = content
        url = f"{self.url}/owner/name/commit/{SHA}"
        return 200, {"success": True, "commitOid": SHA, "commitUrl": url}

    def _info(self, revision: str) -> dict[str, Any]:
        files = self.files[revision]
        card = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), flags=re.DOTALL)
        tags = yaml.safe_load(card[1]).get("tags", []) if card else []
        return {
            **{"id": "owner/name", "sha": SHA, "private": self.private, "tags": tags},
            "siblings": [{"rfilename": name} for name in files],
        }


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a hub on this machine while the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.tokens.add(self.headers.get("authorization", ""))
            status, content = hub.answer(self.command, self.path.partition("?")[0], body)
            written = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", content["error"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        do_GET = do_POST = _reply

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
