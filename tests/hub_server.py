"""A server with the few pages of the Hub that the client of huggingface_hub asks for to push and pull a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """`repos`: name -> path -> content, as of the last commit; large files arrive first, in `large`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Page)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Page(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for method, pattern, page in PAGES:
            if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                return page(self, body, *found.groups())
        self.send(404, b"{}")

    def log_message(self, *what: object) -> None:
        """Say nothing."""

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def files(self, repo: str) -> dict[str, bytes] | None:
        if repo not in self.server.repos:
            self.send(404, b"{}", X_Error_Code="RepoNotFound")
        return self.server.repos.get(repo)

    # ------------------------------------------------------------------------------------------ pages
    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        self.server.repos.setdefault(name, {})
        self.say({"url": f"{self.server.url}/{name}"})

    def modes(self, body: bytes, repo: str) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        mode = {True: "lfs", False: "regular"}
        files = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
        self.say({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for given in objects:
            given["actions"] = {"upload": {"href": f"{self.server.url}/large/{given['oid']}", "header": {}}}
        self.say({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.send(200, b"")

    def commit(self, body: bytes, repo: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.large[value["oid"]]
        self.say({"success": True, "commitOid": SHA, "commitUrl": f"{self.server.url}/{repo}/commit/{SHA}"})

    def info(self, body: bytes, repo: str) -> None:
        if (files := self.files(repo)) is not None:
            self.say({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files]})

    def tree(self, body: bytes, repo: str) -> None:
        if (files := self.files(repo)) is not None:
            self.say([{"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files.items()])

    def file(self, body: bytes, repo: str, name: str) -> None:
        files = self.server.repos.get(repo, {})
        if name not in files:
            return self.send(404, b"", X_Error_Code="EntryNotFound")
        self.send(200, files[name], ETag=f'"{oid(files[name])}"', X_Repo_Commit=SHA)


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


SHA = "0123456789" * 4
REPO = r"([\w.-]+/[\w.-]+)"
PAGES = (
    ("POST", "/api/repos/create", _Page.create),
    ("POST", "/api/validate-yaml", lambda page, body: page.say({"errors": [], "warnings": []})),
    ("POST", f"/api/models/{REPO}/preupload/[^/]+", _Page.modes),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Page.batch),
    ("PUT", "/large/(.+)", _Page.upload),
    ("POST", f"/api/models/{REPO}/commit/[^/]+", _Page.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/[^/]+)?", _Page.info),
    ("GET", f"/api/models/{REPO}/tree/[^/]+", _Page.tree),
    ("GET", f"/{REPO}/resolve/[^/]+/(.+)", _Page.file),
)
