"""A folder of images, and a running pick page."""

from __future__ import annotations

import http.client
import json
import threading

import pytest
from tools.pairing.folders import write_folder

from trl_diffusion_sdpo.tools.pairing.server import PickServer
from trl_diffusion_sdpo.tools.pairing.session import PickSession


@pytest.fixture
def folder(tmp_path):
    """Two prompts of three images."""
    rows = [{"prompt": prompt, "image": f"{prompt}{k}.png", "seed": k} for prompt in "ab" for k in range(3)]
    return write_folder(tmp_path / "images", rows)


@pytest.fixture
def session(folder):
    session = PickSession(folder)
    yield session
    session.close()


class Client:
    """A client that sends what a page would send, unless it is told otherwise."""

    def __init__(self, server: PickServer) -> None:
        self.server, self.port = server, server.server_address[1]

    def request(self, method="GET", path="", body=None, *, token=None, host=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        host = host or f"127.0.0.1:{self.port}"
        if method == "POST":
            headers = {"Origin": f"http://{host}", "Content-Type": "application/json", **headers}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        address = f"/{self.server.token if token is None else token}/{path}"
        connection.request(method, address, content, {"Host": host, **headers})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def ask(self, action, tab="tab", **content):
        status, _, answer = self.request("POST", action, {"tab": tab, **content})
        return status, json.loads(answer)


@pytest.fixture
def client(session):
    with PickServer(session, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Client(server)
        server.shutdown()
        thread.join()
