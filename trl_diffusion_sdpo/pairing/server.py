"""Serve the pick page: one HTML page, the images of the manifest, and the actions of the page as JSON.

The path of each request must begin with a secret token, so other programs and web sites cannot use the server.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..data.images import ImageReader
from .session import PickSession

LOCAL_HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "page.html"
# Image formats that browsers can show. Images in other formats are converted to PNG.
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}


class PickServer(ThreadingHTTPServer):
    """Server of a pick page. With any host but `127.0.0.1`, other machines in the network can open the page."""

    daemon_threads = True

    def __init__(self, session: PickSession, host: str = LOCAL_HOST, port: int = 8765) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        self.host = host
        try:
            super().__init__((host, port), PickHandler)
        except (OSError, OverflowError) as error:  # `OverflowError` if the number is no port
            raise ValueError(
                f"The page cannot be served at {host}, port {port}: {error}. Choose another `--port`."
            ) from error

    @property
    def address(self) -> str:
        """Address of the page, with its token."""
        host = _own_address() if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self.server_address[1]}/{self.token}/"


class PickHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PickServer

    def do_GET(self) -> None:
        path = self._path_after_token()
        if path == "":
            self._send(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path is not None:
            self._send_image(self.server.session.codes.get(path.removeprefix("image/")))

    def do_POST(self) -> None:
        action = self._path_after_token()
        if action is None:
            return
        session = self.server.session
        try:
            values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if action == "pick":
                answer = session.pick(values["first"], values["second"], values["verdict"])
            elif action == "undo":
                answer = session.undo()
            elif action == "result":
                answer = {"result": session.result()}
            else:
                answer = session.state()
        except OSError as error:
            message = f"The pick was not saved: {error.strerror}. Free some disk space, then pick again."
            self._send_json(HTTPStatus.INSUFFICIENT_STORAGE, {"error": message})
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        else:
            self._send_json(HTTPStatus.OK, answer)

    def _path_after_token(self) -> str | None:
        """Return the part of the path after the token. If the token is wrong, refuse the request and return `None`."""
        token, _, path = urlsplit(self.path).path.removeprefix("/").partition("/")
        if hmac.compare_digest(token.encode(), self.server.token.encode()):
            return path
        self._send(
            HTTPStatus.FORBIDDEN,
            b"The token in the address is wrong. Open the address that `pairs pick` printed at its last start.\n",
            "text/plain",
        )
        return None

    def _send_image(self, name: str | None) -> None:
        try:
            if name is None:
                raise FileNotFoundError
            path = self.server.session.folder / name
            kind = TYPES.get(path.suffix.lower())
            content = _as_png(path) if kind is None else path.read_bytes()
        except (OSError, ValueError):
            self._send(HTTPStatus.NOT_FOUND, b"This image was deleted or cannot be read.\n", "text/plain")
        else:
            self._send(HTTPStatus.OK, content, kind or "image/png")

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *ignored: Any) -> None:
        """Write no log, because the paths of requests contain the token."""


def _as_png(path: Path) -> bytes:
    buffer = io.BytesIO()
    ImageReader().decode(path).save(buffer, "PNG")
    return buffer.getvalue()


def _own_address() -> str:
    """Return the IP address of this machine in its local network. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return LOCAL_HOST
