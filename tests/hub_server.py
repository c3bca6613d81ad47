"""A hub on this machine: it speaks the Hugging Face hub's protocol, as far as huggingface_hub's calls here go."""

import base64
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret" + "x" * 25


@dataclass
class Repository:
    """A repository: its commits, each the files of that time."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by their SHA-256

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class Hub(ThreadingHTTPServer):
    """The endpoints that huggingface_hub calls to create a repository, to commit to it, and to read it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.calls: list[str] = []
        self.fault: int | None = None  # the answer to everything
        self.missing: str | None = None  # a file that cannot be read

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        repository = self.repositories.setdefault(name, Repository(private))
        repository.commit(files)
        return repository

    def files(self, name: str) -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.head]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Endpoints(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def answer(self, code: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, x in headers.items():
            self.send_header(name.replace("_", "-"), x)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.calls.append(f"{self.command} {path}")
        if self.server.fault is not None:
            self.answer(self.server.fault, {"error": "no"})
            return
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for command, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if self.command in command and found:
                if self.command == "POST" and not known:
                    self.answer(401, {"error": "Invalid credentials"})
                    return
                names = found.groupdict()
                if "repo" in names:
                    repository = self.server.repositories.get(names.pop("repo"))
                    hidden = repository is not None and repository.private and self.command != "PUT"  # a signed address
                    if repository is None or (hidden and not known):
                        code = "RepoNotFound"
                        self.answer(404 if known else 401, {"error": "Repository not found"}, X_Error_Code=code)
                        return
                    names["repository"] = repository  # type: ignore[assignment]
                function(self, body=body, **names)
                return
        self.answer(404, {"error": path})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    # Writing

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.server.repositories
        if not there:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories[name] = Repository(bool(private))
            self.server.repositories[name].commit({".gitattributes": b""})
        self.answer(409 if there else 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def whoami(self, body: bytes) -> None:
        self.answer(200, {"name": "me", "type": "user", "orgs": []})

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repository: Repository, revision: str) -> None:
        files = [
            {"path": x["path"], "uploadMode": "lfs" if x["path"].endswith("safetensors") else "regular",
             "shouldIgnore": False}
            for x in json.loads(body)["files"]
        ]  # fmt: skip
        self.answer(200, {"files": files})

    def large(self, body: bytes, repository: Repository) -> None:
        name = next(x for x, y in self.server.repositories.items() if y is repository)
        objects = [
            {**x, "actions": {"upload": {"href": f"{self.server.url}/store/{name}/{x['oid']}", "header": {}}}}
            for x in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, repository: Repository, oid: str) -> None:
        if self.server.missing == "store":
            self.answer(413)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        repository.stored[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repository: Repository, revision: str) -> None:
        files = dict(repository.commits[repository.head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = repository.stored[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.commit(files)
        name = next(x for x, y in self.server.repositories.items() if y is repository)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    # Reading

    def info(self, body: bytes, repository: Repository, revision: str = "main") -> None:
        sha = repository.head if revision == "main" else revision
        if sha not in repository.commits:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": x} for x in repository.commits[sha]]
        self.answer(200, {"id": "x", "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, body: bytes, repository: Repository, revision: str) -> None:
        files = repository.commits[revision]
        self.answer(200, [
            {"type": "file", "path": x, "size": len(y), "oid": hashlib.sha1(y).hexdigest()} for x, y in files.items()
        ])  # fmt: skip

    def resolve(self, body: bytes, repository: Repository, revision: str, file: str) -> None:
        if file == self.server.missing:
            self.answer(418)
            return
        content = repository.commits[repository.head if revision == "main" else revision][file]
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=revision)


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Endpoints.create),
    (("GET",), "/api/whoami-v2", Endpoints.whoami),
    (("POST",), "/api/validate-yaml", Endpoints.validate),
    (("POST",), f"/api/models/{REPO}/preupload/(?P<revision>.+)", Endpoints.preupload),
    (("POST",), f"/api/models/{REPO}/commit/(?P<revision>.+)", Endpoints.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Endpoints.large),
    (("PUT",), f"/store/{REPO}/(?P<oid>[0-9a-f]+)", Endpoints.store),
    (("GET",), f"/api/models/{REPO}", Endpoints.info),
    (("GET",), f"/api/models/{REPO}/revision/(?P<revision>.+)", Endpoints.info),
    (("GET",), f"/api/models/{REPO}/tree/(?P<revision>.+)", Endpoints.tree),
    (("GET", "HEAD"), f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Endpoints.resolve),
]
