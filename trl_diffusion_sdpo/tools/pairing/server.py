"""Serve the pick page: one HTML page, the images of the manifest, and a JSON interface.

A request's `Host` header must name this server, as a defence against DNS rebinding by other sites, and its path must
contain the secret token. A POST request's `Origin` header must be the address of the page.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import secrets
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ...data.images import FILE_FORMATS, MAX_FILE_BYTES, ImageReader, check_regular_file
from ...utils.errors import UserError
from .picks import ConflictError
from .session import PickSession

LOCAL_HOST = "127.0.0.1"
USUAL_PORT = 8765
MAX_BODY = 200_000  # bytes of a request's body; a prompt has at most 20,000 characters
PAGE = Path(__file__).parent / "page.html"
# Formats that browsers show as training reads them, if the pixels are RGB. Other images are converted to PNG.
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
    "style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PickServer(ThreadingHTTPServer):
    """Server of a pick page, by default on port 8765, or a free one if that is in use. With any host but `127.0.0.1`,
    other machines in the network can open the page.
    """

    daemon_threads = True

    def __init__(self, session: PickSession, host: str = LOCAL_HOST, port: int | None = None) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        self.host = host
        try:
            super().__init__((host, USUAL_PORT if port is None else port), PickHandler)
        except (OSError, OverflowError) as error:  # `OverflowError` if the number is too large for a port
            if port is not None or host != LOCAL_HOST:
                taken = USUAL_PORT if port is None else port
                raise UserError(
                    f"The page cannot be served at {host}, port {taken}: {error}. Choose another `--port`."
                ) from error
            super().__init__((host, 0), PickHandler)

    def handle_error(self, *ignored: Any) -> None:
        """Say nothing if a browser closes its connection, for example with its tab."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(*ignored)

    @property
    def address(self) -> str:
        """Address of the page, with its token."""
        host = _own_address() if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self.server_address[1]}/{self.token}/"

    def is_own_name(self, name: str) -> bool:
        """Return whether a request's `Host` header names this server.

        At `0.0.0.0`, any IP address is accepted, because DNS rebinding needs a host name. So is any port, because an
        SSH tunnel may use another one.
        """
        try:
            host = urlsplit(f"//{name}").hostname or ""
            if host == "localhost":
                return self.host in (LOCAL_HOST, "0.0.0.0")
            return host == self.host or (self.host == "0.0.0.0" and bool(ipaddress.ip_address(host)))
        except ValueError:  # not a valid address
            return False


class PickHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PickServer
    protocol_version = "HTTP/1.1"  # keeps connections open, which saves time on a phone
    server_version = "pairs"
    sys_version = ""
    timeout = 60  # seconds that a connection may be idle

    def do_GET(self) -> None:
        path = self._allowed_path()
        if path == "":
            nonce = secrets.token_urlsafe(16)
            page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
            policy = {"Content-Security-Policy": POLICY.format(nonce=nonce)}
            self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", policy)
        elif path is not None and path.startswith("image/"):
            self._send_image(self.server.session.codes.get(path.removeprefix("image/")))
        elif path is not None:
            self._refuse(
                HTTPStatus.NOT_FOUND, "There is no page at this address. Open the address that `pairs pick` printed."
            )

    def do_POST(self) -> None:
        path = self._allowed_path()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            self._refuse(HTTPStatus.FORBIDDEN, "A pick must be sent by the pick page itself, not by another site.")
        elif self.headers.get_content_type() != "application/json" or not length.isdecimal():
            self._refuse(HTTPStatus.BAD_REQUEST, "The request must be JSON.")
        elif len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:  # Python converts at most 4300 digits
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too large.")
        else:
            self._answer(path, self.rfile.read(int(length)))

    def _answer(self, action: str, body: bytes) -> None:
        tab = ""
        try:
            asked = json.loads(body)
            tab = str(asked["tab"])[:64]
            answer = self._act(action, tab, asked)
        except ConflictError as error:
            self._send_json(HTTPStatus.CONFLICT, {"error": str(error), **self.server.session.state(tab)})
        except OSError as error:
            message = f"The pick was not saved: {error.strerror}. Free some disk space, then pick again."
            self._send_json(HTTPStatus.INSUFFICIENT_STORAGE, {"error": message})
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        else:
            self._send_json(HTTPStatus.OK, answer)

    def _act(self, action: str, tab: str, asked: dict[str, Any]) -> dict[str, Any]:
        session = self.server.session
        actions: dict[str, Callable[[], dict[str, Any]]] = {
            "state": lambda: session.state(tab),
            "pick": lambda: session.pick(tab, asked["first"], asked["second"], asked["verdict"]),
            "undo": lambda: session.undo(tab, asked["pick"]),
            "prompt": lambda: session.edit_prompt(tab, asked["image"], asked["prompt"]),
            "ranking": lambda: {"ranking": session.ranking()},
            "result": lambda: {"result": session.result()},
        }
        return actions[action]()

    def _allowed_path(self) -> str | None:
        """Return the part of the path after the token, or refuse the request and return `None`."""
        if not self.server.is_own_name(self.headers.get("Host", "")):
            self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST,
                "The address does not name this server. Open the address that `pairs pick` printed.",
            )
            return None
        token, slash, path = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(
                HTTPStatus.FORBIDDEN,
                "The token in the address is wrong. Open the address that `pairs pick` printed at its last start.",
            )
            return None
        return path

    def _send_image(self, name: str | None) -> None:
        path = None if name is None else self.server.session.file(name)
        try:
            if path is None:
                raise FileNotFoundError
            check_regular_file(path, MAX_FILE_BYTES)
            kind = _type_as_it_is(path)
            content = _as_png(path) if kind is None else path.read_bytes()
        except Exception:  # decoders raise errors of any type
            self._refuse(HTTPStatus.NOT_FOUND, "The file of this image was deleted or cannot be read.")
        else:
            self._send(HTTPStatus.OK, content, kind or "image/png", {"Cache-Control": "private, max-age=3600"})

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # the body of the request was not read
        self._send(status, f"{reason}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, content: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Connection": "close" if self.close_connection else "keep-alive",
        }
        self.send_response(status)
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *ignored: Any) -> None:
        """Write no log: the paths of requests contain the token."""


def _type_as_it_is(path: Path) -> str | None:
    """Return the media type of an image that a browser shows as training reads it, or `None`: transparency, 16 bits,
    animations and other formats."""
    with Image.open(path, formats=FILE_FORMATS) as image:
        is_plain = image.mode == "RGB" and not image.has_transparency_data and not getattr(image, "is_animated", False)
        return TYPES.get(image.format or "") if is_plain else None


def _as_png(path: Path) -> bytes:
    buffer = io.BytesIO()
    ImageReader().decode(path).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _own_address() -> str:
    """Return the IP address of this machine in its local network. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return LOCAL_HOST
