"""Serve a part of the Hub's HTTP API on this machine. Tests publish through the real `huggingface_hub` client.

Repositories live in memory. Weights and tables are sent by LFS. Every request is recorded."""

import contextlib
import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants
from huggingface_hub.hf_api import api as default_api
from huggingface_hub.utils import http_backoff

LFS_SUFFIXES = (".safetensors", ".parquet")
KIND = "(?:models|datasets)"  # models and datasets share one namespace here
ID = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class HubRepo:
    repo_id: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their ids

    @property
    def sha(self) -> str:
        return self.commits[-1] if self.commits else "0" * 40


class Request(NamedTuple):
    method: str
    path: str


class HubServer:
    """The server, as tests see it."""

    def __init__(self):
        self.token = "hf_localtesttokenlocaltest"  # the only one that it accepts
        self.user = "tester"
        self.repos: dict[str, HubRepo] = {}  # by `owner/name`
        self.objects: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.requests: list[Request] = []  # all of them, in their order
        self.failing: dict[str, float] = {}  # pattern of `METHOD /path` -> how often it still answers 503
        self.forbidden: set[str] = set()  # repositories that may not be created: 403
        self.lock = threading.Lock()
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def paths(self, method: str) -> list[str]:
        return [request.path for request in self.requests if request.method == method]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubHandler(BaseHTTPRequestHandler):
    """Finds the route, asks for the token where the Hub does, and writes the answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body, path = self.read_body(), unquote(urlsplit(self.path).path)
        is_authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path))
            try:
                if is_failing(self.hub, f"{self.command} {path}"):
                    return self.answer(503, b"<html>Service Unavailable</html>")
                handler, needs_token, match = find_route(self.command, path)
                if needs_token and not is_authorized:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                self.answer(*handler(self.hub, body, **match.groupdict()))
            except Refusal as refusal:
                extra = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
                self.answer(
                    refusal.status, {"error": refusal.message, "errors": [{"message": refusal.message}]}, extra
                )

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def is_failing(hub: HubServer, request: str) -> bool:
    """Whether an endpoint is to answer 503 as a gateway does, with a page that is no JSON; counts down."""
    pattern = next((pattern for pattern, left in hub.failing.items() if left and re.search(pattern, request)), None)
    if pattern is not None:
        hub.failing[pattern] -= 1
    return pattern is not None


def find_route(method: str, path: str):
    for methods, pattern, needs_token, handler in ROUTES:
        if method in methods and (match := re.fullmatch(pattern, path)):
            return handler, needs_token, match
    raise Refusal(404, f"No such route: {method} {path}")


def find_repo(hub: HubServer, repo: str, revision: str = "main") -> HubRepo:
    if repo not in hub.repos:
        raise Refusal(404, "Repository not found", "RepoNotFound")
    if revision not in ("main", hub.repos[repo].sha):
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return hub.repos[repo]


def whoami(hub, body):
    return 200, {"type": "user", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": {"type": "access_token"}}


def create(hub, body):
    asked = json.loads(body)
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in hub.forbidden:
        raise Refusal(403, f"You may not write to {repo_id}")
    if repo_id in hub.repos:
        return 409, {**answer, "error": "You already created this model repo"}
    hub.repos[repo_id] = HubRepo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return 200, answer


def validate_yaml(hub, body):
    content = json.loads(body)["content"]
    yaml.safe_load(re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)[1])
    return 200, {"errors": [], "warnings": []}


def info(hub, body, repo, revision="main"):
    found = find_repo(hub, repo, revision)
    siblings = [{"rfilename": path} for path in sorted(found.files)]
    return 200, {"id": repo, "modelId": repo, "sha": found.sha, "private": found.private, "siblings": siblings}


def tree(hub, body, repo, revision, folder=None):
    files = find_repo(hub, repo, revision).files
    inside = {path: data for path, data in files.items() if folder is None or path.startswith(f"{folder}/")}
    if folder is not None and not inside:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    return 200, [
        {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)} for path, data in inside.items()
    ]


def resolve(hub, body, repo, revision, path):
    found = find_repo(hub, repo, revision)
    if path not in found.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    return 200, found.files[path], {"ETag": f'"{git_oid(found.files[path])}"', "X-Repo-Commit": found.sha}


def preupload(hub, body, repo, revision):
    find_repo(hub, repo, revision)
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": False,
            "oid": None,
        }
        for file in json.loads(body)["files"]
    ]
    return 200, {"files": files}


def lfs_batch(hub, body, repo):
    find_repo(hub, repo)
    objects = json.loads(body)["objects"]
    for item in objects:
        if item["oid"] not in hub.objects:  # the client uploads the objects that have an action
            item["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"}}
    return 200, {"transfer": "basic", "objects": objects}


def lfs_put(hub, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, "The content does not have the SHA-256 of its name")
    hub.objects[oid] = body
    return 200, {}


def commit(hub, body, repo, revision):
    found = find_repo(hub, repo, revision)
    _, *operations = [json.loads(line) for line in body.splitlines()]
    for operation in operations:
        path = operation["value"]["path"]
        if operation["key"] == "file":
            found.files[path] = b64decode(operation["value"]["content"])
        elif operation["key"] == "lfsFile":
            found.files[path] = hub.objects[operation["value"]["oid"]]
        else:
            raise Refusal(400, f"Unknown operation: {operation['key']}")
    oid = hashlib.sha1(body + found.sha.encode()).hexdigest()
    found.commits.append(oid)
    return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{repo}/commit/{oid}"}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


READ = ("GET", "HEAD")
ROUTES = (  # methods, path, whether the token is asked for, handler
    (READ, "/api/whoami-v2", True, whoami),
    (("POST",), "/api/validate-yaml", False, validate_yaml),
    (("POST",), "/api/repos/create", True, create),
    (READ, f"/api/{KIND}/{ID}", True, info),
    (READ, f"/api/{KIND}/{ID}/revision/(?P<revision>[^/]+)", True, info),
    (READ, f"/api/{KIND}/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", True, tree),
    (READ, f"/(?:datasets/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", True, resolve),
    (("POST",), f"/api/{KIND}/{ID}/preupload/(?P<revision>[^/]+)", True, preupload),
    (("POST",), rf"/(?:datasets/)?{ID}\.git/info/lfs/objects/batch", True, lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", False, lfs_put),
    (("POST",), f"/api/{KIND}/{ID}/commit/(?P<revision>[^/]+)", True, commit),
)


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """A running `HubServer` that the installed client talks to, logged in, without the Xet protocol. The client does
    not wait long before another attempt."""
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    with running_hub() as hub:
        point_client_at(hub, monkeypatch, tmp_path / "hf_home")
        huggingface_hub.close_session()  # the next one reads the proxy settings anew
        yield hub
        huggingface_hub.close_session()


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    """A `HubServer` in a thread; subprocesses find it by their environment."""
    hub = HubServer()
    thread = threading.Thread(target=hub.httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield hub
    hub.httpd.shutdown()
    thread.join()
    hub.httpd.server_close()


def point_client_at(hub: HubServer, monkeypatch, home):
    """The client reads its environment when it is imported, so the constants are set as well."""
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    for name, value in {**environment, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(default_api, "endpoint", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew, for this endpoint
